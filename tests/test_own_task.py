"""A task from outside of the package: the README's example, in a folder of its own, and in a package of its own."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_readme import between, blocks

from attention_zoo.commands.main import main

BIN = Path(sys.executable).parent
QUICK = ["steps=3", "batch=4", "tracker=none", "trainer.progress=none", "threads=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (code,), (config,) = blocks("python", between("task")), blocks("yaml", between("task"))
    (tmp_path / "my_tasks" / "conf" / "task").mkdir(parents=True)
    (tmp_path / "my_tasks" / "parity.py").write_text(code)
    (tmp_path / "my_tasks" / "conf" / "task" / "parity.yaml").write_text(config)
    return tmp_path


def run(line: str, folder: Path, *more: str) -> str:
    done = subprocess.run(
        ["bash", "-c", " ".join([line.replace("attention-zoo ", f"{BIN}/attention-zoo "), *more])],
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For commands within this process: what they add to the path, and modules that they find there, go after it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield monkeypatch
    for name in [name for name in sys.modules if name.partition(".")[0] in ("parity", "theirs")]:
        del sys.modules[name]


def commands() -> list[str]:
    return blocks("bash", between("task"))[0].strip().splitlines()


def test_the_readmes_task_trains_from_a_folder_of_its_own(folder: Path) -> None:
    """In a process of its own, by the installed command; what conf/ holds is found from there, too."""
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


def test_a_package_adds_its_tasks_by_an_entry_point(
    folder: Path, tmp_path: Path, here: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    here.syspath_prepend(tmp_path / "site")
    here.chdir(tmp_path)
    assert main(["train", "task=theirs", "output=out", *QUICK]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_the_yaml_names_the_class_of_the_example() -> None:
    assert re.search(r"_target_: parity.Parity", between("task"))


def test_a_task_without_a_constructor_has_the_options_of_its_base(folder: Path, here: pytest.MonkeyPatch) -> None:
    here.chdir(folder / "my_tasks")
    words = shlex.split(commands()[0].partition("attention-zoo ")[2])
    assert main([*words, *QUICK, "+task.test_examples=20"]) == 0
    (row,) = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    assert (row["status"], row["config"]["task"]["test_examples"]) == ("ok", 20)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ids.sum(1) % 2)", "ids.sum(1))", "Parity: targets must be from 0 to 1"),
        ("ids.sum(1) % 2)", "ids)", "Parity: targets must be int64 of shape (4,), got torch.int64 of shape (4, 16)"),
        ("ids.sum(1) % 2)", "ids.sum(1) % 2, groups={'a': ids})", "Parity: groups[a] must have the shape of targets"),
        ('"higher"', '"upper"', "Parity.better must be higher or lower, got 'upper'"),
        ("    vocab, classes = 2, 2\n", "    vocab = 2\n", "Parity.classes must be given for objective"),
        ("Parity(Generated)", "Parity", "task must be a Task (attention_zoo.tasks), got Parity"),
        ("return 0.5", "return '50 %'", "Parity.chance must be a finite number, or None, got '50 %'"),
        ("return 0.5", "return float('nan')", "Parity.chance must be a finite number, or None, got nan"),
        ("(rows, length))", "(rows, size))", "Parity.draw, line 11 of parity_"),
        ("(rows, length))", "(rows, size))", "NameError: name 'size' is not defined"),
        ("return of(", "return (", "Parity.draw must return a Batch, such as `of` makes, got"),
        ("ids.sum(1) % 2)", "ids.mean(1))", "ValueError: a batch is of whole numbers, got float64 of shape"),
        ("batch.ids[:, -1]", "batch.ids", "Parity.guesses: last token must be a tensor of the targets' shape, (1,)"),
        ("batch.ids[:, -1]", "batch.all", "Parity.guesses, line 15 of parity_"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_said_in_a_line(
    old: str, new: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attention_zoo.training.config import compose_training
    from attention_zoo.training.run import run_training

    path = folder / "my_tasks" / "parity.py"
    assert old in path.read_text()
    path.with_name(f"parity_{abs(hash(new))}.py").write_text(path.read_text().replace(old, new))
    monkeypatch.syspath_prepend(str(path.parent))
    config = {**compose_training(QUICK), "seq_len": 16}
    config["task"] = {"_target_": f"parity_{abs(hash(new))}.Parity", "_partial_": True}
    row = run_training(config, folder / "run")
    assert said in row["error"]
    assert row["steps"] == 0, "before training"


def test_a_task_that_python_does_not_find_is_said_with_where_it_was_looked_for(
    folder: Path, tmp_path: Path, here: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    here.chdir(elsewhere)
    assert main(["train", "--config-dir", f"{folder}/my_tasks/conf", "task=parity", "output=out", *QUICK]) != 0
    said = f"No module named 'parity' in {elsewhere}, on PYTHONPATH or among what is installed"
    assert said in capsys.readouterr().err
