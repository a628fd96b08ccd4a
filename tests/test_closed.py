"""Rows closed up before a mechanism and opened after it: the same values and gradients, wherever padding lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import NEWER, RECORDED
from torch import Tensor

import attention_zoo as zoo
from attention_zoo.attention.segments import Segments
from attention_zoo.layout import closed
from attention_zoo.layout.layout import Layout

NAMES = [name for name in (*RECORDED, *NEWER) if name not in ("reformer", "block_recurrent")]
"""Those two lay tokens anew by themselves."""


def layout_of(kind: str, length: int) -> zoo.Tokens:
    generator = torch.Generator().manual_seed(length)
    valid = torch.ones(3, length, dtype=torch.bool)
    column = torch.arange(length)
    if kind == "holes":
        valid = torch.rand(3, length, generator=generator) < 0.6
        valid[:, 0] = False
        valid[2] = False  # a row of nothing but padding
    elif kind == "left":
        valid = column >= torch.tensor([[0], [length // 3], [length - 1]])
    elif kind == "short":
        valid = column < torch.tensor([[length // 2], [length // 3], [1]])
    document = (column * 3 // length).expand(3, length) if kind == "holes" else None
    return zoo.Tokens.of(valid, document=document)


def of_a_call(layer: Any, x: Tensor, tokens: zoo.Tokens, weight: Tensor) -> list[Tensor]:
    """Outputs, and gradients of the layer and of what it is given."""
    x = x.clone().requires_grad_()
    out = layer(x, tokens)
    loss = (out.hidden * weight).sum() + sum(out.losses.values())
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert out.hidden.isfinite().all()
    return [
        out.hidden.detach(),
        *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)),
    ]


@pytest.mark.parametrize("kind", ["holes", "left", "short"])
@pytest.mark.parametrize("name", NAMES)
def test_closed_rows_give_what_open_ones_do(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (13, 64):
        torch.manual_seed(0)
        layer = zoo.build(name, dim=24, heads=2, **zoo.registry.recipe(name)[0].tiny).double()
        x, weight = torch.randn(2, 3, length, 24, dtype=torch.float64)
        tokens = layout_of(kind, length)
        x = x.masked_fill(~tokens.valid[..., None], torch.nan)
        used = []
        with monkeypatch.context() as patch:
            patch.setattr(closed._Closed, "forward", seen_by(used, closed._Closed.forward))
            found = of_a_call(layer, x, tokens, weight)
        front = kind == "left" and isinstance(layer, zoo.attention.pattern.PatternAttention)
        assert bool(used) != front  # padding in front costs patterns nothing
        with monkeypatch.context() as patch:
            patch.setattr(closed.Closed, "of", lambda *_, **__: None)
            for one, other in zip(found, of_a_call(layer, x, tokens, weight), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def seen_by(used: list[bool], forward: Any) -> Any:
    def wrapped(*given: Any) -> Any:
        used.append(True)
        return forward(*given)

    return staticmethod(wrapped)


def test_gradients_at_padding_are_of_nothing_and_masks_may_be_refilled() -> None:
    layer = zoo.build("full", dim=8, heads=2).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 0, 0, 0]]).bool()
    kept = valid.clone()
    out = layer(x, zoo.Tokens.of(valid)).hidden
    valid.fill_(True)
    grad = torch.randn_like(out)
    dx, dbias = torch.autograd.grad(out, [x, layer.to_out.bias], grad)
    torch.testing.assert_close(out[~kept], layer.to_out.bias.expand(9, 8))
    torch.testing.assert_close(dbias, grad.sum((0, 1)))  # as if nothing had been moved
    assert not dx[~kept].any()
    assert dx[kept].isfinite().all()


def test_second_derivatives_pass() -> None:
    layout = Layout.of(layout_of("holes", 13))
    way = closed.Closed.of(layout, front=True)
    x = torch.randn(3, 13, 2, dtype=torch.float64, requires_grad=True)
    assert way is not None
    n = way.layout.valid.shape[1]
    y, blank = (torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True) for shape in ((3, n), ()))
    assert torch.autograd.gradcheck(way.open, (y, blank))
    assert torch.autograd.gradgradcheck(lambda x: way.open(way.close(layout.blanked(x)) ** 2, blank), x)


def test_rows_stay_where_nothing_is_gained() -> None:
    few = torch.arange(64) < torch.tensor([[63], [20]])
    gaps = zoo.Tokens.of(few[:, ::2])._replace(position=torch.arange(0, 96, 3).expand(2, 32))
    for tokens in (zoo.Tokens.all_valid(2, 9), zoo.Tokens.of(few)):
        assert closed.Closed.of(Layout.of(tokens), front=True) is None
    holes = gaps._replace(valid=gaps.valid & (torch.arange(32) % 5 != 2))
    assert closed.Closed.of(Layout.of(holes), front=True) is None  # columns would be no positions
    assert closed.Closed.of(Layout.of(zoo.Tokens.of(few[:, ::2] & (torch.arange(32) % 5 != 2))), front=False)


def test_what_stands_at_padding_is_of_both_attentions_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Segments(dim=24, heads=2, segment_length=5, document=True).double()
    x, weight = torch.randn(2, 3, 31, 24, dtype=torch.float64)
    tokens = layout_of("holes", 31)
    found = of_a_call(layer, x, tokens, weight)
    monkeypatch.setattr(closed.Closed, "of", lambda *_, **__: None)
    for one, other in zip(found, of_a_call(layer, x, tokens, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
