"""Every mechanism and every shape of model goes on from any step to the same bits, however it was ended."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import registry, stopping
from attention_zoo.files import read_jsonl
from attention_zoo.jobs.space import word_of
from attention_zoo.registry import recipe
from attention_zoo.tasks.task import Batch
from attention_zoo.training.ahead import drawn_ahead
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training
from attention_zoo.training.trainer import Trainer

STEPS = 7
SMALL = [
    "tracker=none", "device=cpu", "trainer.progress=none", "model.dim=16", "model.heads=2", "model.depth=2",
    "model.ff_mult=2", "model.output_dropout=0.1", "seq_len=16", "batch=4", f"steps={STEPS}", "trainer.accumulate=2",
    "trainer.checkpoint_every=2", "trainer.eval_every=3", "trainer.log_every=2", "threads=1",
]  # fmt: skip
TEXT = ["task.held_out=null", "task.evaluation_rows=2", "task.span=3"]
MASKED = ["task=mlm", "task.evaluation_rows=2", "seq_len=20"]
PAIRS = ["task=reference", "task.test_examples=4", "encoder.depth=1", "decoder.depth=1"]


def of_mechanism(name: str) -> list[str]:
    """The words of its telling options, in a model that carries its state where it has one."""
    kind = recipe(name)[0]
    tiny = [f"attention.{key}={word_of(value)}" for key, value in kind.tiny.items()]
    task = TEXT if kind.declared.causality != "none" else MASKED
    return [f"attention={name}", *tiny, *task]


SHAPES: dict[str, list[str]] = {
    "hybrid": [*TEXT, "hybrid=[{name: longformer, window: 3},transformer_xl]", "model.positions=none"],
    "reversible": [*TEXT, "attention=longformer", "attention.window=3", "model.reversible=true"],
    "hourglass": [*TEXT, "model.depth=4", 'model.shorten="1@1 2@2 1@1"', "attention=longformer"],
    "funnel": [*MASKED, "model.depth=3", 'model.shorten={name: funnel, layout: "1@1 1@2 1@1"}'],
    "around": [*TEXT, "model.around=[{name: memory_tokens, count: 2, segment_length: 5}]", "attention=longformer"],
    "encoder_decoder": [*PAIRS, "encoder.attention=bigbird", "model=encoder_decoder"],
    "gated": [*TEXT, "model.short_conv={name: gated, width: 3}", "model.feed_forward=swiglu", "model.norm=rms"],
    "learned": [*TEXT, "model.positions=learned", "+model.max_length=64"],
    "batch norm": [*MASKED, "model.norm=batch", "trainer.accumulate=1"],
    "drawn rows": ["task=mqar", "task.test_examples=4", "attention=reformer", "attention.chunk=4", "task.pairs=2"],
}
CASES = {**{name: of_mechanism(name) for name in [*registry.available(), *registry.wrappers()]}, **SHAPES}
QUICK = ("transformer_xl", "memory_tokens", "encoder_decoder")
"""What every run of the tests looks at; the others are a second each."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So little text that a run passes through more than one epoch."""
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(bytes(draw.choice(b"abcdefgh \n") for _ in range(90 + 20 * index)))
    return folder


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_it_goes_on_from_any_step_to_the_same_bits(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    words = CASES[case]
    said = {word.lstrip("+").partition("=")[0] for word in words} | (
        {"model.depth"} if words[0] == "task=reference" else set()
    )
    own = [word for word in SMALL if word.partition("=")[0] not in said]
    text = [] if words[0] in ("task=reference", "task=mqar") else [f"task.path={source}"]
    config = compose_training([*own, *words, *text])
    whole = run_training(config, tmp_path / "whole")
    assert whole["status"] == "ok", whole["error"]
    draw, step, at = random.Random(case), Trainer.step, dict[int, str]()

    def ended(self: Trainer) -> Any:
        how = at.pop(self.done, None)
        if how == "killed":
            raise Killed
        if how == "asked":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "step", ended)
    for how in ("asked", "killed", "asked"):
        at.clear()
        at[draw.randrange(1, STEPS)] = how
        with suppress(Killed, stopping.Stopped):
            run_training(config, tmp_path / "cut")
    at.clear()
    row = run_training(config, tmp_path / "cut")
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["resumed_at"], "it was ended on the way"
    assert left_by(tmp_path / "cut") == left_by(tmp_path / "whole")
    assert zoo.load(tmp_path / "cut") is not None


@pytest.mark.parametrize("words", [["attention=transformer_xl", *TEXT], ["task=mqar", "task.test_examples=4"]])
def test_batches_that_are_drawn_ahead_are_the_same(
    words: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with some lying ready, and gone on with by another number of them."""
    text = [] if words[0] == "task=mqar" else [f"task.path={source}"]
    config = compose_training([*SMALL, *words, *text])
    whole = run_training(config, tmp_path / "whole")
    assert whole["status"] == "ok", whole["error"]
    step = Trainer.step

    def killed(self: Trainer) -> Any:
        if self.done == 5:
            raise Killed
        return step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(Killed):
        run_training({**config, "trainer": {**config["trainer"], "ahead": 3}}, tmp_path / "cut")
    monkeypatch.undo()
    row = run_training({**config, "trainer": {**config["trainer"], "ahead": 1}}, tmp_path / "cut")
    assert (row["status"], row["error"], row["resumed_at"], row["id"]) == ("ok", None, 4, whole["id"])
    (_, *ours), (_, *expected) = left_by(tmp_path / "cut"), left_by(tmp_path / "whole")
    assert ours == expected
    assert row["metrics"] == whole["metrics"]
    assert row["curve"] == whole["curve"]


class Wrong:
    """Batches of which the third cannot be drawn."""

    def __init__(self) -> None:
        self.place = 0

    def __next__(self) -> Any:
        self.place += 1
        if self.place == 3:
            raise ValueError("line 3 is no text")
        return Batch(torch.full((1, 2), self.place), torch.zeros(1, 2, dtype=torch.long), None, torch.tensor([True]))

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_an_error_in_drawing_comes_where_the_batch_would(handlers: None) -> None:
    before = torch.random.get_rng_state()
    batches = drawn_ahead(Wrong(), 4)
    assert [int(next(batches).ids[0, 0]) for _ in range(2)] == [1, 2]
    assert batches.state_dict() == {"place": 2}
    with pytest.raises(ValueError, match="line 3 is no text"):
        next(batches)
    assert torch.equal(torch.random.get_rng_state(), before)


def left_by(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """Row, logged figures and weights, but for times and the peak, which depends on what the process freed when."""
    row = json.loads((folder / "result.json").read_text())
    times = (
        "train_seconds", "wall_seconds", "scoring_seconds", "step_seconds", "tokens_per_second",
        "evaluation_tokens_per_second", "resumed_at", "peak_bytes",
    )  # fmt: skip
    lines = [
        {name: value for name, value in line.items() if "per_second" not in name}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]
    return {k: v for k, v in row.items() if k not in times}, lines, (folder / "model.safetensors").read_bytes()
