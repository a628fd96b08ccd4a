"""The house keeps its shape: imports go one way, files stay readable, heavy dependencies stay lazy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attention_zoo"

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "files",
        "locks",
        "stopping",
        "room",
        "rules",
        "options",
        "schemas",
        "searchpath",
        "tokens",
        "abilities",
        "constants",
        "place",
        "hub",
        "words",
    ),
    ("layout",),
    ("contract",),
    ("ops",),
    ("positions",),
    ("attention",),
    ("registry", "settings"),
    ("model",),
    ("results", "statistics"),
    ("tasks", "measure", "tracking"),
    ("parallel",),
    ("training",),
    ("report", "integrations", "overview", "inspect", "advice"),
    ("jobs",),
    ("commands",),
)
"""Each part may import those in earlier lines and its own line; `testing` may import all, and nothing imports it."""
PUBLIC = ("", "__init__")
"""The package itself, which only hands out names: what it imports, everybody may have loaded."""
LAZY = ("xformers", "triton", "transformers", "wandb", "plotly", "hydra", "scipy", "attention_zoo.testing")
"""What `import attention_zoo` must not load."""
LONGEST = 400
"""Lines of a file, Triton kernels aside."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports from this package, inside functions too, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute"
            assert node.module is not None
            # `from attention_zoo import registry` imports a part by name
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "attention_zoo")


def part_of(name: str) -> str:
    return [*name.split("."), ""][1]


def rank(part: str) -> int:
    (found,) = (number for number, parts in enumerate(LAYERS) if part in parts)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    known = {name for parts in LAYERS for name in parts}
    for name, line in imported(path):
        target, where = part_of(name), f"{path.relative_to(ROOT)}:{line} imports {name}"
        if part in ("testing", "__init__", "__main__", "start"):
            continue
        assert target != "testing", f"{where}: nothing imports the suite"
        if target not in known:
            # a public name of the package itself, such as attention_zoo.build
            assert rank(part) > rank("registry"), f"{where}: a lower part must import from where the name is defined"
            continue
        assert rank(target) <= rank(part), f"{where}: {target} comes after {part}"


def test_no_file_imports_itself_through_others() -> None:
    """Imports inside functions count."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    needs = {}
    for name, path in names.items():
        found = {each if each in names else each.rpartition(".")[0] for each, _ in imported(path)}
        # the package itself only hands out names
        needs[name] = {each for each in found if each in names and not f"{name}.".startswith(f"{each}.")}
    order = graphlib.TopologicalSorter(needs)
    order.prepare()  # raises a CycleError that names the circle


def test_every_part_has_its_place() -> None:
    apart = {"testing", "start", "__init__", "__main__", "__pycache__", "conf"}
    known = {name for parts in LAYERS for name in parts} | apart
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts <= known, f"say in LAYERS where these stand: {sorted(parts - known)}"


def test_experiments_use_the_package_and_not_the_other_way() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            foreign = [name for name in names if name.split(".")[0] in ("experiments", "tests", "conf")]
            assert not foreign, f"{path.relative_to(ROOT)}:{node.lineno} imports {foreign}"


def test_classes_never_see_the_configuration() -> None:
    """Mechanisms and models take plain values: neither hydra nor omegaconf is known below the entry points."""
    for part in ("ops", "positions", "attention", "model", "contract.py"):
        for path in [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py")):
            text = path.read_text()
            for word in ("import hydra", "from hydra", "omegaconf"):
                assert word not in text, f"{path.relative_to(ROOT)} knows of {word.split()[-1]}"


def test_files_stay_readable() -> None:
    for path in [*FILES, *sorted((ROOT / "experiments").rglob("*.py"))]:
        lines = path.read_text().count("\n")
        limit = 100 if path.parent.name == "experiments" else LONGEST
        assert lines <= limit or path.name == "triton.py", (
            f"{path.relative_to(ROOT)} has {lines} lines, at most {limit}"
        )
        if lines > 1:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} says nothing of itself"


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        f"import sys, attention_zoo\n"
        f"attention_zoo.build('longformer', dim=16, heads=2)\n"
        f"print([name for name in {LAZY!r} if name in sys.modules])\n"
        f"import attention_zoo.training.run\n"
        f"print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy, wandb = done.stdout.splitlines()
    assert heavy == "[]", f"import attention_zoo loads {heavy}"
    assert wandb == "False", "W&B is imported only where it is wanted"
