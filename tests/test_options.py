"""Options: what is outside of an annotation is refused in one line, what is in it is left as it is."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import nn

import attention_zoo as zoo
from attention_zoo import room
from attention_zoo.attention.longformer import Longformer
from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.options import (
    Finite,
    Named,
    Natural,
    Positive,
    Probability,
    WrongOption,
    check_fields,
    check_target,
    checked,
)
from attention_zoo.rules import OneOf, shown
from attention_zoo.tasks import Mqar, Text
from attention_zoo.training.optimizer import adamw


class Component(nn.Module):
    @checked
    def __init__(
        self,
        first: Any = None,
        *,
        dim: Positive,
        window: Natural = 3,
        wrap: Annotated[str, OneOf("row", "reference")] = "row",
        factor: Finite | None = None,
        steps: Positive | Sequence[Positive] = 1,
        dropout: Probability = 0.0,
        norm: Named = "layer",
        taps: Annotated[int, Field(ge=0, le=9, description="a number of taps")] = 0,
        bare: bool = True,
        other: Nowhere = None,  # type: ignore[name-defined]
    ):
        super().__init__()
        self.given = {"dim": dim, "steps": steps, "factor": factor, "other": other}


@pytest.mark.parametrize(("options", "message"), [
    ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
    ({"dim": True}, "dim must be an integer of at least 1, got True"),
    ({"dim": 2.0}, "dim must be an integer of at least 1, got 2.0"),
    ({"dim": "3"}, "dim must be an integer of at least 1, got '3'"),
    ({"dim": None}, "dim must be an integer of at least 1, got None"),
    ({"dim": 2**40}, "dim must be at most 2147483647, got 1099511627776"),
    ({"dim": 10**5000}, "dim must be at most 2147483647, got int of 16610 bits"),
    ({"wrap": "ring"}, "wrap must be one of row, reference, got 'ring'"),
    ({"wrap": ["row"]}, "wrap must be one of row, reference, got ['row']"),
    ({"factor": math.nan}, "factor must be a finite number, got nan"),
    ({"factor": -math.inf}, "factor must be a finite number, got -inf"),
    ({"factor": {}}, "factor must be a number, got {}"),
    ({"factor": 10**30}, "factor must be a number, got 1000000000000000000000000000000"),
    ({"steps": [1, 0]}, "steps must be an integer of at least 1, or a list, each entry an integer of at least 1, got"),
    ({"steps": "12"}, "steps must be an integer of at least 1, or a list, each entry an integer of"),
    ({"dropout": 1.0}, "dropout must be a probability below 1, got 1.0"),
    ({"dropout": math.nan}, "dropout must be a probability below 1, got nan"),
    ({"norm": 3}, "norm must be a word, or a mapping with a name and options, got 3"),
    ({"taps": -1}, "taps must be a number of taps, got -1"),
    ({"taps": 10}, "taps must be at most 9, got 10"),
    ({"bare": 1}, "bare must be true or false, got 1"),
    ({"windw": 1}, "windw is no option of Component; did you mean window?; it has bare, dim,"),
], ids=shown)  # fmt: skip
def test_a_wrong_value_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Component(**{"dim": 4, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_without_a_name_is_said() -> None:
    with pytest.raises(WrongOption, match="dim must be given to Component"):
        Component()
    with pytest.raises(WrongOption, match="Component takes its options by name, got 4 without"):
        Component(None, 4)  # type: ignore[misc]
    assert issubclass(WrongOption, TypeError), "Python's own word for a wrong call"


def test_right_values_go_on_as_they_were_given() -> None:
    steps, other = [1, 2], object()
    built = Component(dim=4, steps=steps, factor=3, other=other)
    assert built.given["steps"] is steps
    assert built.given["other"] is other
    assert type(built.given["factor"]) is int
    Component(dim=4, steps=(1, 2), norm={"name": "rms"}, factor=torch.tensor(0.5).item())


def test_a_checked_constructor_is_what_it_was() -> None:
    assert list(inspect.signature(Component).parameters)[:3] == ["first", "dim", "window"]
    assert inspect.signature(Longformer).parameters["window"].default == 256
    layer = zoo.build("longformer", dim=8, heads=2, window=3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.to_q.weight, layer.to_q.weight)
        assert twin.window == 3


class Bare(PatternAttention):
    """A third party's, without annotations: its own words are not known, the shared ones are checked."""

    name = "bare"
    declared = Abilities(
        causality="strict", carry="prefix", two_sided=True, global_tokens="any", cross=False,
        compute="quadratic", activations="linear", state="linear",
    )  # fmt: skip

    def __init__(self, *, nearest=2, **shared):
        self.taken = shared.pop("taken", None)
        super().__init__(**shared)
        self.nearest = nearest

    def bias(self, queries, keys):
        return hide((queries.position[:, :, None] - keys.position[:, None, :])[:, None].abs() <= self.nearest)


def test_third_parties_need_no_annotations() -> None:
    layer = Bare(dim=8, heads=2, nearest=3.5, taken="anything")
    assert layer.taken == "anything"
    assert layer(torch.randn(1, 5, 8)).hidden.isfinite().all()
    with pytest.raises(ValueError, match="causal must be true or false, got 2147483648"):
        Bare(dim=8, heads=2, causal=2147483648)
    with pytest.raises(ValueError, match=r"haeds is no option of bare; did you mean heads\?"):
        Bare(dim=8, heads=2, haeds=2)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("full", {"causal": 2147483648}, "causal must be true or false, got 2147483648"),
    ("full", {"scale": {}}, "scale must be a number from -10000 to 10000, got {}"),
    ("longformer", {"scale": math.nan}, "scale must be a number from -10000 to 10000, got nan"),
    ("bigbird", {"scale": 1e9}, "scale must be at most|scale must be a number from -10000 to 10000, got"),
    ("reformer", {"key_norm_epsilon": [1, 2]}, r"key_norm_epsilon must be a number of at least 0, got \[1, 2\]"),
    ("reformer", {"hash_seed": "../x"}, "hash_seed must be an integer of at least .*, got '../x'"),
    ("reformer", {"chunk": 2048, "look_back": 1000}, "chunk, look_back, look_ahead must give at most 16777216 pairs"),
    ("longformer", {"dilation": 2.5}, "dilation must be an integer of at least 1, or a list.*, got 2.5"),
    ("full", {"kernel": {}}, "kernel must be text, got {}"),
    ("full", {"dim": 8, "heads": 2**31}, "heads must be at most 65536, got 2147483648"),
    ("full", {"positions": {"name": "rotary", "base": math.inf}}, "base must be above 0, and finite, got inf"),
    ("full", {"positions": {1: 2}}, "positions must be a word, or a mapping with a name and options, got {1: 2}"),
], ids=shown)  # fmt: skip
def test_mechanisms_refuse_what_reached_torch(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.build(name, **{"dim": 8, "heads": 2, **options})


@pytest.mark.parametrize(("options", "message"), [
    ({"origin": -1}, "origin must be a mapping, got -1"),
    ({"attention": {"name": "full", "seed": [1]}}, r"seed must be an integer.*, got \[1\]"),
    ({"norm": {"name": "rms", "eps": -1}}, "norm.eps must be a number above 0, got -1"),
    ({"norm": {"name": "layer", "eps": None}}, "norm.eps must be a number above 0, got None"),
    ({"windw": 3}, "windw is no option of Transformer"),
    ({"dept": 3}, "dept is no option of Transformer; did you mean depth?"),
    ({"depth": 10**9}, "depth must be at most 4096, got 1000000000"),
    ({"embedding": [1]}, r"embedding must be a mapping, got \[1\]"),
    ({"reversible": 2}, "reversible must be false, true or both, got 2"),
    ({"output_dropout": math.nan}, "output_dropout must be a probability below 1, got nan"),
    ({"reversible": "both", "embedding": {"cutoffs": [3]}}, "an embedding with cutoffs needs hidden states as wide"),
], ids=shown)  # fmt: skip
def test_models_refuse_what_reached_torch(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.Transformer(**{"attention": "full", "vocab": 11, "dim": 8, "heads": 2, "depth": 1, **options})


@pytest.mark.parametrize("options", [
    {"scale": 1e-300}, {"scale": -1e-300},
    {"positions": {"name": "rotary", "base": 1e-6, "scaling": "linear", "factor": 1e-6}},
], ids=str)  # fmt: skip
def test_what_is_small_and_accepted_is_finite(options: dict[str, Any]) -> None:
    for name in ("full", "longformer", "bigbird"):
        layer = zoo.build(name, dim=8, heads=2, **options)
        out = layer(torch.randn(2, 9, 8)).hidden
        out.sum().backward()
        assert out.isfinite().all()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_an_encoder_decoder_is_made_of_transformers() -> None:
    with pytest.raises(ValueError, match="encoder must be a Transformer, got 3"):
        zoo.EncoderDecoder(encoder=3, decoder=None)  # type: ignore[arg-type]


def test_tasks_and_optimizers_refuse_by_name() -> None:
    for make, message in (
        (lambda: Mqar(test=1.5), "test must be a list"),  # type: ignore[arg-type]
        (lambda: Mqar(train=[[8, 2, math.nan]]), "train must be a list.*nan"),
        (lambda: Mqar(train=[[8.5, 2, 1]]), r"train must list \[length, pairs, share\]"),
        (lambda: Text(path=200), "path must be text, got 200"),  # type: ignore[arg-type]
        (lambda: Text(skip="tests"), "skip must be a list, each entry text, got 'tests'"),
        (lambda: adamw(nn.Linear(1, 1), lr=math.nan, weight_decay=0.0), "optimizer.lr must be a finite number"),
        (lambda: adamw(nn.Linear(1, 1), lr=1.0, weight_decay=0.0, betas=[0.9]), "optimizer.betas must be two prob"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_sizes_that_no_machine_holds_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda: 2**20)
    with pytest.raises(ValueError, match=r"full: its weights must fit into memory, .* with dim=1024"):
        zoo.build("full", dim=1024, heads=2)
    with pytest.raises(ValueError, match=r"Transformer: its weights must fit .* with vocab=2147483647"):
        zoo.Transformer(attention="full", vocab=2**31 - 1, dim=8, heads=2)
    with torch.device("meta"):
        assert zoo.build("full", dim=1024, heads=2).to_q.weight.is_meta, "elsewhere nothing is held"
    monkeypatch.setattr(room, "memory_bytes", lambda: None)
    zoo.build("full", dim=1024, heads=2)


def test_building_draws_what_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the checks nor the count of sizes touch the generator."""
    torch.manual_seed(1)
    counted = zoo.Transformer(attention="bigbird", vocab=11, dim=8, heads=2, depth=2)
    monkeypatch.setattr(room.Room, "counts", staticmethod(lambda: False))
    torch.manual_seed(1)
    plain = zoo.Transformer(attention="bigbird", vocab=11, dim=8, heads=2, depth=2)
    for (name, mine), theirs in zip(counted.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(mine, theirs), name


@dataclass
class Inner:
    share: Probability = 0.5


@dataclass
class Outer:
    inner: Inner
    lengths: list[Positive]
    plans: dict[str, Inner]


def test_fields_of_dataclasses_are_checked_by_full_key() -> None:
    check_fields(Outer, Outer(Inner(), [1], {"a": Inner(0.1)}))
    for wrong, message in (
        (Outer(Inner(2.0), [1], {}), "inner.share must be a probability below 1, got 2.0"),
        (Outer(Inner(), [0], {}), "lengths must be a list, each entry an integer of at least 1, got \\[0\\]"),
        (Outer(Inner(), [1], {"a": Inner(math.nan)}), "plans.a.share must be a probability below 1, got nan"),
        ({"inner": 3, "lengths": [1], "plans": {}}, "inner must be a mapping, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fields(Outer, wrong)
    with pytest.raises(ValueError, match="threads must be at most 1024, got 99999999999"):
        SpeedCell("full", 8, threads=99999999999)


def test_a_target_is_checked_without_a_call() -> None:
    check_target(Component, {"window": 0}, "group.")
    check_target(Bare, {"nearest": 3, "dim": 8}, "attention.")
    check_target(dict, {"anything": 1})
    with pytest.raises(ValueError, match=r"group\.windw is no option of Component; did you mean window\?"):
        check_target(Component, {"windw": 0}, "group.")
    with pytest.raises(ValueError, match=r"attention\.heads must be an integer of at least 1, got 'two'"):
        check_target(Bare, {"heads": "two"}, "attention.")


VALUES = [10**5000, "a\nb" * 99, {"a": {"b": {"c": [1] * 999}}}, object(), "\udcff"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_any_value_is_shown_in_one_line(value: Any) -> None:
    line = shown(value)
    assert "\n" not in line
    assert 0 < len(line) <= 300


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, or a list"):
        Component(dim=4, steps=endless)
