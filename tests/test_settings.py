"""The boundary of configs: what cannot be meant is refused by its full key, in one line, before anything runs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING, OmegaConf

import attention_zoo as zoo
from attention_zoo.attention.longformer import Longformer
from attention_zoo.integrations.weights.commands import ConvertConfig, EvaluateConfig
from attention_zoo.jobs.compare import CompareConfig
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.options import Positive, Probability
from attention_zoo.settings import finite, plain_values, settings
from attention_zoo.training.config import check, compose_training, device_of
from attention_zoo.training.run import run_folder, run_training


@dataclass
class Inner:
    share: Probability = 0.5


@dataclass
class Schema:
    count: Positive = MISSING
    inner: Inner = field(default_factory=Inner)
    free: Any = None


def test_a_schema_with_ranges_is_read() -> None:
    """OmegaConf sees the types, the boundary the ranges, too."""
    found = settings(OmegaConf.structured(Schema(count=3)))
    assert found == Schema(count=3)
    for values, message in (
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"count": 1, "inner": {"share": 1.0}}, "inner.share must be a probability below 1, got 1.0"),
        ({}, r"count must be given, got \?\?\?"),
        ({"count": 1, "free": "${nothing}"}, "free: Interpolation key 'nothing' not found"),
        ({"count": 1, "free": {"deep": [1, math.nan]}}, r"free.deep\[1\] must be a finite number, got nan"),
        ({"count": 1, "free": "${free}"}, "free: Recursive interpolation detected"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            settings(OmegaConf.merge(OmegaConf.structured(Schema), values))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_numbers_are_finite_wherever_they_stand() -> None:
    finite({"a": [1, 2.5, {"b": None}], "c": "nan"})
    for value, place in (({"a": {"b": math.inf}}, "a.b"), ([[-math.inf]], r"\[0\]\[0\]"), ({"a": 10**400}, "a")):
        with pytest.raises(ValueError, match=f"^{place} must be a"):
            finite(value)
    with pytest.raises(ValueError, match="x must be a finite number, got nan"):
        plain_values(OmegaConf.create({"x": math.nan}))


@pytest.mark.parametrize(("override", "message"), [
    ("a=b=c", r"Error parsing override 'a=b=c': .* an override is written key=value"),
    ("steps=???", r"steps must be given, got \?\?\?"),
    ("steps=${nothing}", "steps: Interpolation key 'nothing' not found"),
    ("steps=${steps}", "steps: Recursive interpolation detected"),
    ("task.path=${steps}", "task.path must be text, got 200"),
    ("optimizer.lr=nan", "optimizer.lr must be a finite number, got nan"),
    ("trainer.stop_at=inf", "trainer.stop_at must be a finite number, got inf"),
    ("tracker.init_timeout=inf", "tracker.init_timeout must be a finite number, got inf"),
    ("tracker.init_timeout=0", "tracker.init_timeout must be a positive number of seconds, got 0"),
    ("tracker.mode=on", "tracker.mode must be one of auto, online, offline, got 'on'"),
    ("tracker.project=3", "tracker.project must be text, got 3"),
    ("trainer.clip=0", "trainer.clip must be a positive number or null, got 0.0"),
    ("trainer.progress=loud", "trainer.progress must be one of auto, bar, lines, none, got 'loud'"),
    ("threads=99999999999", "threads must be at most 1024, got 99999999999"),
    ("threads=0", "threads must be an integer of at least 1, got 0"),
    ("device=cpu:1", "device must be cpu, cuda or cuda:<number>, got 'cpu:1'"),
    ("model=3", r"Config group override must be a string or a list. Got int \(from 'model=3'\)"),
    ("~task", r"task must be given, got \?\?\?"),
    ("task._target_=foo", "task._target_ must name a class or function, got 'foo': No module named 'foo'"),
    ("+model.vocab=3", "model.vocab is the run's to say, got 3"),
    ("+optimizer.momentum=3", "optimizer.momentum is no option of adamw"),
    ("hybrid=[3]", "hybrid must be a name, a mapping"),
    ("'hybrid=[{name: longformer, windw: 3}]'", r"hybrid\[0\].windw is no option of longformer; did you mean window\?"),
    ("batch=2147483647", "batch=2147483647, seq_len=512 must fit into memory"),
    ("optimizer.betas=[0.9,1.0]", r"optimizer.betas must be two probabilities below 1, got \[0.9, 1.0\]"),
], ids=str)  # fmt: skip
def test_a_training_config_is_refused_before_it_runs(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(compose_training([override.strip("'")]))
    assert "\n" not in str(caught.value)


def test_a_stack_of_many_has_a_name_that_a_disk_takes() -> None:
    names = ["longformer", "full"] * 12
    config = check(compose_training([f"hybrid=[{','.join(names)}]", "model.depth=24"]))
    assert config["backend"] == "+".join(names)
    assert len(run_folder(config).name) < 200


def test_cpu_has_one_name() -> None:
    assert device_of("cpu:0") == "cpu"
    assert check(compose_training(["device=cpu:0"]))["device"] == "cpu"
    assert BenchmarkConfig(device="cpu:0").resolved_device() == "cpu"


@pytest.mark.parametrize(("act", "message"), [
    (lambda: BenchmarkConfig(timeout_s=math.inf).cells(), "timeout_s must be a finite number above 0, got inf"),
    (lambda: BenchmarkConfig(threads=100_000).cells(), "threads must be at most 1024, got 100000"),
    (lambda: BenchmarkConfig(memory_limit_gib=-1.0).cells(), "memory_limit_gib must be a number above 0, got -1.0"),
    (lambda: BenchmarkConfig(dtype="int8").cells(), "dtype must be one of float64, float32, bfloat16, float16"),
    (lambda: CompareConfig(picture_length=0).runs(), "picture_length must be an integer of at least 1, got 0"),
    (lambda: CompareConfig(measure=BenchmarkConfig(batch=0)).runs(), "measure.batch must be an integer of at least 1"),
    (lambda: settings(OmegaConf.structured(ConvertConfig)), r"source must be given, got \?\?\?"),
    (lambda: settings(OmegaConf.structured(EvaluateConfig(source="x", mask_probability=2.0))), "task.path must be"),
], ids=range(8))  # fmt: skip
def test_the_other_commands_refuse_by_full_key(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.slow
def test_a_refused_run_does_not_end_a_sweep(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", "-m", f"output={tmp_path}", "steps=${nothing},1", "seq_len=8",
               "batch=1", "model.dim=8", "model.heads=1", "model.depth=1", "tracker=none", "device=cpu", "task=mqar",
               "task.pairs=2", "task.test_examples=4"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode != 0
    assert "error: steps: Interpolation key 'nothing' not found" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("mqar-*/result.json")), "the other run took place"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "schedule=3"], "schedule must be one of constant, cosine, got 3"),
        (["train", "schedule=${steps}"], "schedule must be one of constant, cosine, got ${steps}"),
        (["train", "schedule=[null]"], "schedule must be one of constant, cosine, got [null]"),
        (["report", "+titel=x"], "titel is no known option; did you mean title?"),
        (["convert", "source=a", "output=b", "+lengthen.windw=3"], "lengthen.windw is no known option"),
        (["benchmark", "backends=[full]", "+options.full=true"], "options.full must be a mapping, got True"),
    ],
)
def test_what_a_command_cannot_mean_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    from attention_zoo.commands.main import main

    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_what_a_component_refuses_has_its_full_key():
    from attention_zoo.training.building import full_key

    given = {"attention": partial(Longformer, window=3), "vocab": 4}
    assert full_key("feed_forward must be x", "model", zoo.Transformer, given) == "model.feed_forward must be x"
    assert full_key("kv_heads must be x", "model", zoo.Transformer, given) == "attention.kv_heads must be x"
    assert full_key("positions.base must be x", "model", zoo.Transformer, given) == "model.positions.base must be x"
    assert full_key("scaling must be x", "model", zoo.Transformer, given) == "model: scaling must be x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "positions={name: rotary, scaling: yarn}",
            "positions.scaling must be one of none, linear, llama3, got 'yarn'",
        ),
        ("positions={name: rotary, low_freq_factor: 9}", "positions.low_freq_factor must be above 0 and below"),
        ("positions={name: axial, row_width: 99}", "positions.row_width must be between 0 and dim=64, got 99"),
        ("positions={name: sinusoidal, base: 0}", "positions.base must be "),
        ("norm={name: rms, eps: -1}", "norm.eps must be a number above 0, got -1"),
        ("feed_forward={name: relu, width: 0}", "feed_forward.width must be an integer of at least 1, got 0"),
        ("embedding={dropout: 2}", "embedding.dropout must be a probability below 1, got 2"),
        ("embedding={cutoffs: [3, 2]}", "embedding.cutoffs must rise between 0 and vocab="),
    ],
)
def test_options_of_components_are_named_in_full(words: str, said: str, tmp_path: Path) -> None:
    key, _, value = words.partition("=")
    config = compose_training(["task=mqar", "tracker=none", "trainer.progress=none", f"++model.{key}={value}"])
    row = run_training(config, tmp_path / "run")
    assert row["error"].startswith(f"model.{said}")
