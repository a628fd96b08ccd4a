"""A task from outside of the package: the README's example, in a folder of its own, and in a package of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import between, blocks

BIN = Path(sys.executable).parent
QUICK = ["steps=3", "batch=4", "tracker=none", "trainer.progress=none", "threads=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (code,), (config,) = blocks("python", between("task")), blocks("yaml", between("task"))
    (tmp_path / "my_tasks" / "conf" / "task").mkdir(parents=True)
    (tmp_path / "my_tasks" / "parity.py").write_text(code)
    (tmp_path / "my_tasks" / "conf" / "task" / "parity.yaml").write_text(config.partition("\n")[2])
    return tmp_path


def run(line: str, folder: Path, *more: str) -> str:
    done = subprocess.run(
        ["bash", "-c", " ".join([line.replace("attention-zoo ", f"{BIN}/attention-zoo "), *more])],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[str]:
    return blocks("bash", between("task"))[0].strip().splitlines()


def test_the_readmes_task_trains_from_a_folder_of_its_own(folder: Path) -> None:
    run(commands()[0], folder, *QUICK)
    (row,) = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    assert (row["status"], row["task"], row["backend"]) == ("ok", "parity", "longformer")
    assert row["chance"] == 0.5
    assert 0.3 < row["baselines"]["last token"] < 0.7


@pytest.mark.slow
def test_the_readmes_task_takes_part_in_a_comparison(folder: Path) -> None:
    small = ["'backends=[full]'", "'measure.lengths=[16]'", "picture_length=8", "~trainings.text", "~trainings.mqar"]
    run(commands()[1], folder, *small)
    (path,) = folder.rglob("results.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "quality"]
    assert (row["status"], row["task"], row["steps"]) == ("ok", "parity", 3)


def test_a_package_adds_its_tasks_by_an_entry_point(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "theirs"
    (package / "conf" / "task").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "conf" / "__init__.py").touch()
    (package / "parity.py").write_text((folder / "my_tasks" / "parity.py").read_text())
    config = (folder / "my_tasks" / "conf" / "task" / "parity.yaml").read_text().replace("parity.P", "theirs.parity.P")
    (package / "conf" / "task" / "theirs.yaml").write_text(config)
    about = tmp_path / "site" / "theirs-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[attention_zoo.conf]\ntheirs = theirs.conf\n")
    words = f"PYTHONPATH={tmp_path / 'site'} attention-zoo train task=theirs output=out"
    assert "accuracy" in run(words, tmp_path, *QUICK)


def test_the_yaml_names_the_class_of_the_example() -> None:
    assert re.search(r"_target_: parity.Parity", between("task"))
