"""What a call may bring: wrong arguments are refused in one line that names them, by layers and models alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import RECORDED

import attention_zoo as zoo

VALID = torch.ones(2, 6, dtype=torch.bool)
TOKENS = zoo.Tokens.of(VALID)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"valid": [[True]]}, "valid must be a bool tensor"),
        ({"start": -1}, "start must be an integer from 0"),
        ({"start": 1.5}, "start must be an integer from 0"),
        ({"start": True}, "start must be an integer from 0"),
        ({"start": torch.tensor([1, 2, 3])}, "start must be an integer, or a tensor of 2 integers, got torch.int64 of"),
        ({"start": torch.tensor([1.0, 2.0])}, "start must be an integer, or a tensor of 2 integers, got torch.float32"),
        ({"document": "x"}, "document must be a tensor"),
        ({"is_global": 3}, "is_global must be a tensor"),
        ({"is_global": VALID.to("meta")}, "is_global must be where valid is, on cpu, got meta"),
    ],
)
def test_tokens(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        zoo.Tokens.of(**{"valid": VALID, **given})


def test_where_a_row_starts_may_be_a_list():
    assert zoo.Tokens.of(VALID, start=[1, 2]).position[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("name", RECORDED)
def test_a_layer(name: str):
    layer, x = zoo.build(name, dim=8, heads=2), torch.randn(2, 6, 8)
    other = zoo.build("full" if name == "transformer_xl" else "transformer_xl", dim=8, heads=2)
    wide = zoo.build(name, dim=16, heads=2)
    for given, said in (
        ({"x": [[1]]}, "x must be a dense tensor of floats"),
        ({"x": torch.ones(2, 6, 8, dtype=torch.long)}, "x must be a dense tensor of floats"),
        ({"tokens": TOKENS._replace(valid=VALID.float())}, "valid must be bool"),
        ({"tokens": zoo.Tokens.of(VALID.to("meta"))}, "tokens must be where the input is"),
        ({"state": "x"}, "state must be of"),
        ({"state": other.initial_state(2)}, "state must be of"),
        ({"state": layer.initial_state(3)}, "state must hold keys of shape"),
        ({"state": wide.initial_state(2)}, "state must hold keys of shape"),
        ({"source": "x"}, "source must be a Source"),
    ):
        with pytest.raises(ValueError, match=said):
            layer(**{"x": x, "tokens": TOKENS, **given})
    for size in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 0"):
            layer.initial_state(size)


def test_a_kernel_without_a_name_is_none_of_those_there_are():
    with pytest.raises(ValueError, match="kernel= is not supported"):
        zoo.build("full", dim=8, heads=2).attend(*(torch.randn(2, 2, 6, 4) for _ in range(3)), kernel="")


def test_a_model():
    model, ids = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2), torch.zeros(2, 6, dtype=torch.long)
    deep = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2, depth=3)
    for given, said in (
        ({"ids": [[1]]}, "ids must be integers"),
        ({"ids": VALID}, "ids must be integers"),
        ({"state": 3}, "state must be of this model"),
        ({"state": model.initial_state(5)}, "state must have as many rows as ids, 2, got 5"),
        ({"state": deep.initial_state(2)}, "state must be of a model with 2 blocks, got one of 3"),
        ({"fresh": [1], "state": model.initial_state(2)}, "fresh must be bool of shape"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**{"ids": ids, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ids": [[1]]}, "ids must be integers"),
        ({"valid": VALID[:, :3]}, "valid must be bool of shape"),
        ({"temperature": 1e-300}, "temperature must be from 1e-30"),
        ({"temperature": 10**400}, "temperature must be from 1e-30"),
        ({"temperature": True}, "temperature must be above 0, got True"),
        ({"eos": 1.5}, "eos must be an integer"),
        ({"eos": 10**30}, "eos must be at most"),
    ],
)
def test_writing(given: dict[str, Any], said: str):
    model = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2)
    with pytest.raises(ValueError, match=said):
        zoo.generate(model, **{"ids": torch.zeros(2, 6, dtype=torch.long), "steps": 2, **given})
