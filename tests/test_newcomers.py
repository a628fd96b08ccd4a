"""A new mechanism is one file and one yaml: each kind is added to a copy of the project, whose own tests stay green.

Nothing else of the copy is touched. It runs whatever bears the newcomer's name, the contract suite first, and what is
said of all mechanisms at once: structure, registry, overview, README and the recorded figures.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attention_zoo.testing import contract_checks

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "newcomers"
COPIED = ("attention_zoo", "conf", "experiments", "tests", ".ci", "README.md", "pyproject.toml")
HOUSE = ("test_architecture", "test_overview", "test_registry", "test_readme", "test_what_is_recorded")
"""Files and tests that speak of all mechanisms at once; where each has a test of its own, that one bears its name."""
NOT_OF_MECHANISMS = ("plugin", "integrations", "command")
"""What these files hold besides: other packages, and commands, which run in processes of their own."""

NEWCOMERS = [
    "strided",  # README's example, verbatim
    "anchors",  # a pattern that sees near and far
    "linear_transformer",  # no pattern: a recurrence with a state and a reference of its own
    "recurrent_memory",  # a wrapper with a state of its own beside that of what stands inside
]
LONG = ("anchors", "linear_transformer")
WRAPPERS = ("recurrent_memory",)
"""Those that stand around others."""


def source(name: str) -> tuple[str, str]:
    """File and yaml of a newcomer: beside this test, or in the README."""
    if (HERE / f"{name}.py").exists():
        return (HERE / f"{name}.py").read_text(), (HERE / f"{name}.yaml").read_text()
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(rf'```python\n((?:(?!```).)*name = "{name}".*?)```', readme, re.DOTALL)
    (recipe,) = re.findall(rf"```yaml\n(# conf/attention/{name}\.yaml\n.*?)```", readme, re.DOTALL)
    return code, recipe


def house(folder: Path, name: str) -> Path:
    """A copy of the project with one file and one yaml more."""
    for part in COPIED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    # as installed: the configuration lies in the package
    (folder / "attention_zoo" / "conf").symlink_to(Path("..", "conf"))
    code, recipe = source(name)
    module = yaml.safe_load(recipe)["_target_"].rpartition(".")[0]
    folder.joinpath(*module.split(".")).with_suffix(".py").write_text(code)
    (folder / "conf" / "attention" / f"{name}.yaml").write_text(recipe)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process that finds the copy first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in NEWCOMERS]
)
def test_the_tests_of_the_project_stay_green(name: str, tmp_path: Path) -> None:
    folder = house(tmp_path, name)
    kind = "wrappers" if name in WRAPPERS else "available"
    found = python(folder, "-c", f"import attention_zoo as zoo; print(zoo.__file__, *zoo.{kind}())").stdout.split()
    assert Path(found[0]).is_relative_to(folder), "the copy must be what is tested"
    assert name in found
    words = f"({' or '.join((name, *HOUSE))}) and not ({' or '.join(NOT_OF_MECHANISMS)})"
    chosen = ["-m", "not slow", "-k", words, "--ignore", f"tests/{Path(__file__).name}"]
    done = python(folder, "-m", "pytest", "-n2", "-x", "-p", "no:cacheprovider", "-rN", *chosen)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 200, done.stdout[-500:]


OPTION = "        chunk: tokens that are computed at once.\n"
FORGOTTEN = [
    ("the_file_says_what_it_is", '"""', '0, """', "begin the file of LinearTransformer with a docstring"),
    ("options_are_described", OPTION, "", "say under `Args:` of LinearTransformer what its option chunk means"),
    ("fast_equals_slow", "def reference(", "def by_loops(", "a static method reference(layer, x, tokens) -> hidden"),
    ("the_core_runs_alone", "def attend(self, ", "def attend(self, r, ", "override `core` to say what attend takes"),
    (
        "it_compiles_as_one_operator",
        "    @one_operator\n",
        "",
        "put @one_operator (attention_zoo.attention.operator) on its",
    ),
]
"""The check that notices, what the code has, what it has instead, and what must be said."""


@pytest.mark.parametrize(("name", "place", "instead", "said"), FORGOTTEN, ids=[each[0] for each in FORGOTTEN])
def test_what_is_forgotten_is_said_in_a_sentence(
    name: str, place: str, instead: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the author of a mechanism who did not read the README."""
    code = source("linear_transformer")[0].replace("from __future__ import annotations\n", "", 1)
    assert place in code
    (tmp_path / f"newcomer_{name}.py").write_text(code.replace(place, instead, 1))
    monkeypatch.syspath_prepend(tmp_path)
    cls = importlib.import_module(f"newcomer_{name}").LinearTransformer
    (check,) = (check for check in contract_checks(cls, chunk=64) if check.name == name)
    with pytest.raises(AssertionError, match=re.escape(said)):
        check()
