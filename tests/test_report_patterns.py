"""The picture of a mechanism is found from the layer alone, and agrees with what the mechanism defines."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import attention_zoo as zoo
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Output, Tokens
from attention_zoo.report.patterns import GRADIENT, UNSEEN, VALUE, pairs_of, portrait, told, visible

SMALL = {
    "full": {},
    "longformer": {"window": 5},
    "bigbird": {"block": 4, "random": 1},
    "reformer": {"chunk": 4, "rounds": 2},
    "transformer_xl": {"segment_length": 6, "memory_length": 6},
}
L = 40


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("name", zoo.available())
def test_every_backend_has_a_picture_without_future(name):
    row = portrait(name, SMALL.get(name), length=L)
    assert row["status"] == "ok", row["error"]
    json.dumps(row, allow_nan=False)
    seen = torch.tensor(pairs_of(row))
    assert not (seen[~causal(L)] != UNSEEN).any(), "no token sees what follows"
    first = 2 if name == "memory_compressed" else 0  # before a group of three is whole there is a null key alone
    assert (seen == GRADIENT).any(1)[first:].all(), "every token sees something, if only itself"
    assert row["abilities"]["causality"] in ("strict", "values")


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_patterns_are_seen_as_they_are_defined(name):
    torch.manual_seed(0)
    layer = zoo.build(name, dim=32, heads=4, causal=True, **SMALL[name]).double().eval()
    assert isinstance(layer, PatternAttention)
    tokens = layer.mark(Tokens.all_valid(1, L))
    defined = (layer.full_bias(tokens, tokens) > -torch.inf).any(1)[0]
    assert torch.equal(visible(layer, L, dim=32) != UNSEEN, defined)


def test_transformer_xl_sees_its_memory_without_gradient():
    layer = zoo.build("transformer_xl", dim=32, heads=4, segment_length=6, memory_length=6).double().eval()
    found = visible(layer, L, dim=32)
    query, key = torch.arange(L)[:, None], torch.arange(L)
    border = query // 6 * 6
    expected = torch.where(key >= border, GRADIENT, torch.where(key >= border - 6, VALUE, UNSEEN))
    assert torch.equal(found, expected.where(causal(L), torch.tensor(UNSEEN)))


def test_a_layer_that_nobody_knows_is_pictured_too():
    class Before(nn.Module):
        """Sees itself and its left neighbour, the latter without gradient."""

        def forward(self, x, tokens=None, *, state=None, source=None, choices=None):
            return Output(x + nn.functional.pad(x.detach(), (0, 0, 1, 0))[:, :-1])

    found = visible(Before(), 5, dim=3)  # type: ignore[arg-type]
    assert torch.equal(found, GRADIENT * torch.eye(5).long() + VALUE * torch.ones(4).diag(-1).long())


def test_what_goes_wrong_is_a_row():
    row = portrait("longformer", {"window": -1})
    assert row["status"] == "failed"
    assert "window" in row["error"]
    assert portrait("transformer_xl", {"positions": "alibi"})["status"] == "unsupported"
    assert portrait("longformre")["error"].startswith("ValueError: attention must be one of")


def test_the_picture_is_told_in_numbers():
    row = portrait("longformer", {"window": 5}, length=L)
    said = told(row)
    assert said["keys a query, most"] == 6
    assert said["farthest key seen"] == 5
    assert said["pairs without gradient"] == 0
    assert said["share of the causal half"] == pytest.approx((6 * L - 15) / (L * (L + 1) / 2))
