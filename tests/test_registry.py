"""Names, options, defaults and messages; backends of third parties; a new mechanism as one file and one yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.registry import options_of, recipe, third_party

ROOT = Path(__file__).parents[1]


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"attention must be one of .*full, longformer.*'longfromer'.*did you mean longformer"
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
    assert zoo.build("longformer", dim=16, heads=2, window=7).reach == 7


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


def test_a_plugin_is_swapped_in_by_one_word_of_the_config(tmp_path: Path) -> None:
    """`attention=near`, with its options, on the command line of a fresh process."""
    plugin(tmp_path, "Near")
    words = ["attention=near", "attention.window=3", "task=mqar", "--cfg", "job"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "experiments.train", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "_target_: tiny_plugin.Near" in done.stdout
    assert "window: 3" in done.stdout


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


SINKS = '''"""A window and the first few tokens, which everybody sees. Xiao et al. 2024, §3. O(L · (window + sinks))."""

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, at_least


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

    @property
    def reach(self):
        return self.window

    def mark(self, tokens):
        return tokens._replace(is_global=(tokens.is_global | (tokens.position < self.sinks)) & tokens.valid)

    def bias(self, queries, keys):
        gap = queries.position[:, None, :, None] - keys.position[:, None, None, :]
        return hide(gap.abs() <= self.window)
'''

EVERYTHING = """
import json
import torch
import attention_zoo as zoo
from attention_zoo.testing import contract_checks

assert zoo.available().count("sinks") == 1
failed = []
for check in contract_checks("sinks"):
    if not check.slow:
        try:
            check()
        except Exception as error:
            failed.append(f"{check}: {type(error).__name__}: {error}")
model = zoo.Transformer(attention="sinks", vocab=11, dim=16, heads=2, depth=2)
out = model(torch.randint(11, (2, 50)))
out.logits.sum().backward()
print(json.dumps({"where": zoo.__file__, "failed": failed, "shape": list(out.logits.shape)}))
"""


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
def test_a_new_mechanism_is_one_file_and_one_yaml(house: Path) -> None:
    """With no other edit it passes the suite and sits in a model."""
    result = json.loads(python(house, "-c", EVERYTHING).splitlines()[-1])
    assert Path(result["where"]).is_relative_to(house), "the copy must be what was tested"
    assert not result["failed"], "\n".join(result["failed"])
    assert result["shape"] == [2, 50, 11]


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
