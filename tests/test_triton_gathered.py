"""Compressed memories by Triton against the loop over segments, in float64: outputs, gradients, cuts, padding."""

from __future__ import annotations

import copy

import pytest
import torch
from references.compressive import reference
from triton_device import close, on_triton

import attention_zoo as zoo
from attention_zoo.attention import compressive_lots, compressive_plans
from attention_zoo.testing.case import feed, gradients

__all__ = ["on_triton"]
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # older interpreters' own
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, on_triton) -> None:
    from attention_zoo.ops.relative import triton

    monkeypatch.setattr(triton, "TILE", 16)


def built(device, heads=1, **options):
    """A layer in float32, and the same in float64."""
    sizes = {"segment_length": 5, "memory_length": 4, "compressed_length": 2, "ratio": 2}
    layer = zoo.build("compressive", dim=8, heads=heads, causal=True, kernel="triton", **{**sizes, **options})
    exact = copy.deepcopy(layer).double()
    return layer.to(device), exact


def moved(tokens, device):
    return zoo.Tokens(*(field.to(device) for field in tokens))


def left(kept, length):
    return zoo.Tokens.of(torch.arange(length) >= length - torch.tensor(kept)[:, None])


DOCUMENTS = zoo.Tokens.of(torch.ones(1, 17, dtype=torch.bool), document=torch.tensor([[0] * 3 + [1] * 14]))


@pytest.mark.parametrize(
    ("tokens", "few", "numbers", "options"),
    [
        (left([13, 4], 13), 1 << 22, 1 << 25, {"heads": 2}),
        (DOCUMENTS, 0, 1, {"ratio": 3}),  # pieces of like sizes, each a lot of its own
        (left([31], 33), 1 << 22, 1 << 25, {"segment_length": 17, "memory_length": 13}),  # several tiles
        (left([1], 1), 1 << 22, 1 << 25, {}),
    ],
    ids=["left padding", "documents", "tiles", "one token"],
)
def test_equals_the_loop_over_segments(monkeypatch, on_triton, tokens, few, numbers, options) -> None:
    monkeypatch.setattr(compressive_plans, "FEW_SCORES", few)
    monkeypatch.setattr(compressive_lots, "NUMBERS", numbers)
    (layer, exact), valid = built(on_triton, **options), tokens.valid
    x = torch.randn(*valid.shape, 8).double().requires_grad_()
    slow = reference(exact, x, tokens)
    mine = x.detach().float().to(on_triton).requires_grad_()
    fast = layer(mine, moved(tokens, on_triton)).hidden
    close(fast[valid.to(on_triton)], slow[valid], "output")
    wanted = gradients(exact, x, slow, valid)
    for of, grad in gradients(layer, mine, fast, valid.to(on_triton)).items():
        close(grad, wanted[of], f"gradient of {of}")


def test_any_cut_is_the_same(on_triton) -> None:
    layer, exact = built(on_triton)
    x = torch.randn(1, 17, 8)
    cut = feed(layer, x.to(on_triton), moved(DOCUMENTS, on_triton), [4, 12])[0]
    close(cut, reference(exact, x.double(), DOCUMENTS), "output")


def test_neither_padding_nor_the_future_matters(on_triton) -> None:
    layer, _ = built(on_triton)
    tokens = left([6, 11], 11)
    valid = tokens.valid.to(on_triton)
    x = torch.randn(2, 11, 8)
    other = x.clone()
    other[:, 8:], other[0, :5] = 3 * torch.randn(2, 3, 8), torch.nan
    found = []
    for given in (x, other):
        given = given.to(on_triton).requires_grad_()
        out = layer(given, moved(tokens, on_triton)).hidden[:, :8][valid[:, :8]]
        out.square().sum().backward()
        assert not given.grad[:, 8:].any()
        assert not given.grad[~valid].any()
        found.append((out.detach(), given.grad))
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_scores_above_100(on_triton) -> None:
    layer, exact = built(on_triton)
    tokens, x = zoo.Tokens.all_valid(1, 9), 60 * torch.randn(1, 9, 8)
    scores = exact.to_q(x.double()) @ exact.to_k(x.double()).transpose(1, 2) * exact.scale
    assert scores.abs().max() > 100
    close(layer(x.to(on_triton), moved(tokens, on_triton)).hidden, reference(exact, x.double(), tokens), "output")


def test_positions_that_are_not_there_are_left_to_another_kernel(on_triton) -> None:
    layer, exact = built(on_triton)
    tokens = zoo.Tokens.all_valid(1, 9)._replace(position=torch.tensor([[0, 1, 2, 3, 5, 6, 8, 9, 10]]))
    x = torch.randn(1, 9, 8)
    with pytest.raises(zoo.Unsupported, match=r"kernel=triton is not.*a token sees positions that are not there"):
        layer(x.to(on_triton), moved(tokens, on_triton))
    layer.kernel = exact.kernel = "auto"
    close(layer(x.to(on_triton), moved(tokens, on_triton)).hidden, exact(x.double(), tokens).hidden, "positions")
