"""One position scheme for all, unless a mechanism has its own: never sinusoids on top of those unless somebody asks."""

from typing import Any

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.model.mechanisms import has_own_positions
from attention_zoo.model.saved import load, save
from attention_zoo.model.transformer import Transformer
from attention_zoo.registry import recipe
from attention_zoo.training.config import compose_training

SIZES: dict[str, Any] = {"vocab": 16, "dim": 16, "depth": 2, "heads": 2}
OWN = ("compressive", "transformer_xl")


def test_those_with_positions_of_their_own() -> None:
    assert tuple(name for name in zoo.available() if has_own_positions(recipe(name)[0])) == OWN


@pytest.mark.parametrize("name", [*zoo.available(), *zoo.wrappers()])
def test_every_mechanism_has_one_scheme(name: str) -> None:
    model = Transformer(attention=name, **SIZES)
    assert model.config["positions"] == ("none" if name in OWN else "sinusoidal")
    assert (model.positions is None) == (name in OWN)


@pytest.mark.parametrize(
    "attention",
    [
        ["longformer", "transformer_xl"],
        {"name": "memory_tokens", "inner": {"name": "transformer_xl", "memory_length": 8}},
    ],
)
def test_a_stack_with_one_such_mechanism_adds_none(attention: Any) -> None:
    assert Transformer(attention=attention, **SIZES).config["positions"] == "none"


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_who_asks_for_sinusoids_on_top_gets_them(positions: str) -> None:
    model = Transformer(attention="transformer_xl", positions=positions, **SIZES)
    assert model.positions is not None
    assert model.config["positions"] == positions


def test_what_was_chosen_is_saved(tmp_path: Any) -> None:
    model = Transformer(attention="transformer_xl", **SIZES)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config["positions"] == "none"
    ids = torch.arange(12)[None]
    assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


@pytest.mark.parametrize("task", ["text", "enwik8", "mqar"])
def test_no_task_brings_sinusoids_to_transformer_xl(task: str) -> None:
    config = compose_training([f"task={task}", "attention=transformer_xl"])
    assert config["model"]["positions"] == ("none" if task == "mqar" else "auto")
