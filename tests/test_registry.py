"""Names, options, defaults and messages; backends of third parties; a new mechanism as one file and one yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import registry
from attention_zoo.commands.main import main
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.overview import abilities_rows, kernel_rows
from attention_zoo.registry import options_of, recipe, third_party

ROOT = Path(__file__).parents[1]
SHIPPED = zoo.available()


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"attention must be one of .*full, .*longformer, .*'longfromer'.*did you mean longformer"
    ):
        zoo.build("longfromer", dim=16, heads=2)


@pytest.mark.parametrize("name", zoo.available())
def test_an_unknown_option_names_the_nearest(name: str) -> None:
    with pytest.raises(Unsupported, match=rf"{name}: option haeds .*did you mean heads\?.*use .*causal"):
        zoo.build(name, dim=16, heads=2, haeds=3)


def test_wrong_values_name_the_option_the_rule_and_the_value() -> None:
    with pytest.raises(ValueError, match="window must be an integer of at least 1, got -1"):
        zoo.build("longformer", dim=16, heads=2, window=-1)
    with pytest.raises(ValueError, match="heads must divide dim, got heads=7 for dim=64"):
        zoo.build("full", dim=64, heads=7)
    with pytest.raises(ValueError, match="kv_heads must divide heads, got kv_heads=3 for heads=4"):
        zoo.build("full", dim=64, heads=4, kv_heads=3)
    with pytest.raises(Unsupported, match="full: kernel=fast is not supported: it has no such kernel; use auto or"):
        zoo.build("full", dim=16, heads=2, kernel="fast")


@pytest.mark.parametrize("name", zoo.available())
def test_options_of_a_backend_are_complete(name: str) -> None:
    """Shared options, own options, and the defaults that build() uses."""
    options = options_of(name)
    shared = {"dim", "heads", "kv_heads", "head_width", "bias", "scale", "causal", "cross", "positions", "seed"}
    assert shared <= set(options)
    cls, defaults = recipe(name)
    assert issubclass(cls, Attention)
    assert set(defaults) <= set(options)
    assert cls.name == name
    layer = zoo.build(name, dim=16, heads=2)
    assert isinstance(layer, cls)
    assert layer.causal


def test_an_option_reaches_the_layer() -> None:
    assert zoo.build("longformer", dim=16, heads=2, window=7).reach.farthest == 7


def plugin(folder: Path, entry: str) -> None:
    """A tiny package with its metadata, as pip would have installed it."""
    (folder / "tiny_plugin.py").write_text(
        "from attention_zoo.attention.longformer import Longformer\n"
        "class Near(Longformer):\n"
        "    name = 'near'\n"
        "recipe = {'_target_': 'tiny_plugin.Near', 'window': 5}\n"
        "nothing = 3\n"
    )
    info = folder / "tiny_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attention_zoo.backends]\nnear = tiny_plugin:{entry}\n")


@pytest.mark.parametrize(("entry", "window"), [("Near", 256), ("recipe", 5)])
def test_third_parties_add_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, window: int) -> None:
    """Through the entry-point group `attention_zoo.backends`: a class, or a mapping in the form of our yaml."""
    plugin(tmp_path, entry)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_plugin", raising=False)
    assert "near" in zoo.available()
    layer = zoo.build("near", dim=16, heads=2)
    assert type(layer).__name__ == "Near"
    assert layer.window == window
    assert zoo.build("near", dim=16, heads=2, window=2).window == 2
    assert zoo.build("near", dim=16, heads=2)(torch.randn(1, 9, 16)).hidden.shape == (1, 9, 16)
    monkeypatch.delitem(sys.modules, "tiny_plugin")


def test_a_plugin_is_swapped_in_by_one_word_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`attention=near`, with its options, on the command line."""
    plugin(tmp_path, "Near")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_plugin", raising=False)
    assert main(["train", "attention=near", "attention.window=3", "task=mqar", "--cfg", "job"]) == 0
    told = capsys.readouterr().out
    assert "_target_: tiny_plugin.Near" in told
    assert "window: 3" in told
    monkeypatch.delitem(sys.modules, "tiny_plugin")


def test_a_plugin_that_cannot_be_loaded_is_left_out_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_plugin", raising=False)
    with pytest.warns(UserWarning, match=r"backend 'near' \(tiny_plugin:missing\) cannot be loaded"):
        assert third_party() == {}
    monkeypatch.delitem(sys.modules, "tiny_plugin")


def test_a_plugin_that_is_no_attention_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_plugin", raising=False)
    with pytest.raises(ValueError, match=r"backend 'near' must .* subclass of .*Attention, got 3"):
        zoo.build("near", dim=16, heads=2)
    monkeypatch.delitem(sys.modules, "tiny_plugin")


# --- faults of third parties -----------------------------------------------------------------------------------------

BASE = "from attention_zoo.contract import Abilities, Attention\nfrom attention_zoo.attention.full import Full\n"
FAULTS = {
    "raises": ("raise RuntimeError('no such library')", r"RuntimeError: no such library"),
    "ends the process": ("import sys\nsys.exit(3)", r"SystemExit: 3"),
    "stops in its own way": ("class Stop(BaseException): pass\nraise Stop", r"cannot be loaded: Stop"),
    "lacks a package": ("import nonesuch_library", r"No module named 'nonesuch_library'"),
    "is no Python": ("def (:", r"SyntaxError"),
    "is empty": ("", r"cannot be loaded: AttributeError: .*Broken"),
    "is no attention": ("class Broken: pass", r"must be a subclass of attention_zoo.contract.Attention"),
    "has no name": (f"{BASE}class Broken(Attention): declared = Full.declared", r"must say its name: Broken has no"),
    "declares nothing": (f"{BASE}class Broken(Attention): name = 'broken'", r"must declare its Abilities .*got None"),
    "declares a word": (f"{BASE}class Broken(Full): declared = 'everything'", r"Abilities .*got 'everything'"),
    "declares what is not": (
        f"{BASE}from dataclasses import replace\n"
        "class Broken(Full): declared = replace(Full.declared, causality='maybe')",
        r"must declare causality as one of none, values, strict, got 'maybe'",
    ),
    "has no positions": (
        f"{BASE}from dataclasses import replace\nclass Broken(Full): declared = replace(Full.declared, positions=None)",
        r"must declare positions as a tuple of words, got None",
    ),
    "names no class": ("Broken = {'window': 3}", r"KeyError: '_target_'"),
    "names a class that is not": ("Broken = {'_target_': 'nowhere.Broken'}", r"No module named 'nowhere'"),
    "names half a class": ("Broken = {'_target_': 'Broken'}", r"ValueError: Empty module name"),
}


def broken(folder: Path, source: str, name: str = "broken", module: str = "broken_plugin") -> None:
    (folder / f"{module}.py").write_text(source + "\n")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attention_zoo.backends]\n{name} = {module}:Broken\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages; what one test was told of is told again in the next."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_told", {})
    yield tmp_path
    for module in [name for name in sys.modules if name.startswith("broken_plugin")]:
        del sys.modules[module]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plugin_that_cannot_be_used_is_left_out_and_says_why(installed: Path, fault: str) -> None:
    source, reason = FAULTS[fault]
    broken(installed, source)
    with pytest.warns(UserWarning, match=rf"^backend 'broken' .*{reason}.*; left out$") as told:
        assert zoo.available() == SHIPPED
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    with pytest.warns(UserWarning, match="left out"):
        assert third_party() == {}
    with pytest.warns(UserWarning, match="left out"):
        assert [row[0] for row in abilities_rows()] == [*SHIPPED, *zoo.wrappers()]
    with pytest.warns(UserWarning, match="left out"):
        assert {cell.backend for cell in BenchmarkConfig(lengths=[16]).cells()} == set(SHIPPED)
    for ask in (
        lambda: zoo.build("broken", dim=16, heads=2),
        lambda: zoo.Transformer(attention="broken", vocab=11, dim=16),
        lambda: BenchmarkConfig(lengths=[16], backends=["broken"]).cells(),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_name_that_is_taken_stays_with_its_owner(installed: Path) -> None:
    broken(installed, f"{BASE}class Broken(Full): name = 'longformer'", name="longformer")
    with pytest.warns(
        UserWarning, match=r"backend 'longformer' \(broken_plugin:Broken\) has a name that attention_zoo"
    ):
        assert zoo.available() == SHIPPED
    assert type(zoo.build("longformer", dim=16, heads=2)).__module__.startswith("attention_zoo.")


def test_a_name_that_two_packages_claim_is_nobodys(installed: Path) -> None:
    for module in ("broken_plugin_one", "broken_plugin_two"):
        broken(installed, f"{BASE}class Broken(Full): name = 'broken'", module=module)
    with pytest.warns(UserWarning, match="'broken' is what several packages call theirs") as told:
        assert zoo.available() == SHIPPED
    assert len(told) == 1
    with pytest.raises(
        ValueError, match=r"broken_plugin_\w+:Broken, broken_plugin_\w+:Broken\): uninstall all but one"
    ):
        zoo.build("broken", dim=16, heads=2)


def test_a_package_that_is_found_twice_is_one(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is installed and lies on the path besides."""
    again = installed / "again"
    again.mkdir()
    for folder in (installed, again):
        broken(folder, f"{BASE}class Broken(Full): name = 'broken'")
    monkeypatch.syspath_prepend(again)
    assert zoo.available() == tuple(sorted([*SHIPPED, "broken"]))


@pytest.mark.parametrize("content", [b"[attention_zoo.backends]\nbroken", b"\xff\xfe\x00"])
def test_entry_points_that_cannot_be_read_cost_no_others(installed: Path, content: bytes) -> None:
    broken(installed, "", module="broken_plugin_one")
    (installed / "broken_plugin_one-1.0.dist-info" / "entry_points.txt").write_bytes(content)
    broken(installed, f"{BASE}class Broken(Full): name = 'broken'")
    with pytest.warns(UserWarning, match="the entry points of package broken_plugin_one cannot be read: .*left out"):
        assert zoo.available() == tuple(sorted([*SHIPPED, "broken"]))


def test_a_backend_that_ends_the_process_when_built_is_named(installed: Path) -> None:
    broken(
        installed,
        f"{BASE}class Broken(Full):\n    name = 'broken'\n    def __init__(self, **shared): raise SystemExit(3)",
    )
    with pytest.raises(ValueError, match=r"backend 'broken' cannot be built: it ends the process \(3\)"):
        zoo.build("broken", dim=16, heads=2)
    assert ("broken", "own") in [row[:2] for row in kernel_rows(64) if "cannot be built: ValueError" in row[2]]
    assert "broken" in {cell.backend for cell in BenchmarkConfig(lengths=[16]).cells()}


@pytest.mark.parametrize("words", [
    ["attention_zoo", "abilities", "--markdown"],
    ["experiments.train", "attention=longformer", "task=mqar", "--cfg", "job"],
], ids=lambda words: words[0])  # fmt: skip
def test_commands_run_beside_a_plugin_that_ends_the_process(tmp_path: Path, words: list[str]) -> None:
    broken(tmp_path, *FAULTS["ends the process"][:1])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "longformer" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "broken" in line]
    assert "backend 'broken' (broken_plugin:Broken) cannot be loaded: SystemExit: 3; left out" in line
    assert len(done.stderr.strip().splitlines()) == 1


# --- a new mechanism of our own ---------------------------------------------------------------------------------------

SINKS = '''"""A window and the first few tokens, which everybody sees. Xiao et al. 2024, §3. O(L · (window + sinks))."""

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, at_least
from attention_zoo.layout.reach import Band


class Sinks(PatternAttention):
    """Args:
        window: tokens before a token that it sees.
        sinks: first tokens of each document that all see.
    """

    name = "sinks"
    declared = Abilities(
        causality="strict", carry="prefix", two_sided=False, global_tokens="first_call", cross=False,
        compute="linear", activations="linear", state="constant", positions=("none", "rotary"),
    )
    tiny = {"window": 4, "sinks": 2}

    def __init__(self, *, window: int = 256, sinks: int = 4, **shared):
        at_least(1, window=window, sinks=sinks)
        super().__init__(**shared)
        self.window, self.sinks = window, sinks
        self.reach = Band(window, weights="uniform")

    def mark(self, tokens):
        return tokens._replace(is_global=(tokens.is_global | (tokens.position < self.sinks)) & tokens.valid)

    def bias(self, queries, keys):
        gap = queries.position[:, None, :, None] - keys.position[:, None, None, :]
        return hide(gap.abs() <= self.window)
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy laid out as the wheel is, with one file and one yaml more."""
    folder = tmp_path_factory.mktemp("house")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attention_zoo", folder / "attention_zoo", ignore=ignore)
    shutil.copytree(ROOT / "conf", folder / "attention_zoo" / "conf", ignore=ignore)
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=ignore)
    (folder / "attention_zoo" / "attention" / "sinks.py").write_text(SINKS)
    (folder / "attention_zoo" / "conf" / "attention" / "sinks.yaml").write_text(
        "_target_: attention_zoo.attention.sinks.Sinks\n_partial_: true\nwindow: 256\nsinks: 4\n"
    )
    return folder


def python(house: Path, *arguments: str) -> str:
    """What the copy prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_new_mechanism_is_compared_and_reported(house: Path) -> None:
    """Benchmark, both trainings and the report know it by its name."""
    python(house, "-m", "experiments.compare", "preset=smoke", "backends=[full,sinks]", "output=out")
    rows = [json.loads(line) for line in (house / "out" / "results.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["backend"] == "sinks"]
    assert {"speed", "quality"} <= {row["kind"] for row in mine}
    assert {row["task"] for row in mine if row["kind"] == "quality"} == {"text", "mqar"}
    assert [row["error"] for row in mine if row["status"] != "ok"] == []
    assert "sinks" in (house / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_new_mechanism_is_swept(house: Path) -> None:
    small = ("task=mqar", "model=tiny", "model.dim=16", "steps=2", "batch=4", "task.test_examples=8", "tracker=none")
    python(house, "-m", "experiments.train", "-m", "attention=full,sinks", *small, "device=cpu", "output=swept")
    rows = [json.loads(path.read_text()) for path in (house / "swept").rglob("result.json")]
    assert sorted((row["backend"], row["status"]) for row in rows) == [("full", "ok"), ("sinks", "ok")]
