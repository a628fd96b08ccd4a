"""Rotary positions by Triton equal those that torch computes."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, on_triton

import attention_zoo as zoo
from attention_zoo.layout import kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.positions.rotary import Rotary

__all__ = ["on_triton"]

pairs = pytest.importorskip("attention_zoo.ops.triton.pairs", reason="triton is not installed")


@pytest.fixture(autouse=True)
def counted(monkeypatch, on_triton) -> list[int]:
    """A call adds to it."""
    calls: list[int] = []
    run = pairs.turned
    monkeypatch.setattr(pairs, "turned", lambda *given: (calls.append(1), run(*given))[1])
    return calls


def of(x: torch.Tensor, layout: Layout, monkeypatch, devices: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """What x becomes, its gradient and the gradient's own."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "TRITON_DEVICES", devices)
        scheme = Rotary(heads=x.shape[1], head_width=x.shape[3])
        x = x.detach().requires_grad_()
        out = scheme.turn(x, layout)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).requires_grad_()
        grad = torch.autograd.grad((out * weight).sum(), x, create_graph=True)[0]
        (twice,) = torch.autograd.grad((grad * x.detach()).sum(), weight)
        return out.detach(), grad.detach(), twice


@pytest.mark.parametrize(("length", "width"), [(1, 2), (1, 64), (2, 6), (31, 16), (64, 96), (257, 6), (257, 64)])
@pytest.mark.parametrize("apart", [False, True])
def test_pairs_are_turned_and_turned_back(monkeypatch, counted, length: int, width: int, apart: bool) -> None:
    torch.manual_seed(length * width)
    x = torch.randn(2, length, 3, width, device=DEVICE).transpose(1, 2)  # heads of a projection
    tokens = zoo.Tokens.of(valid=torch.rand(2, length, device=DEVICE) > 0.3) if apart else None
    layout = Layout.plain(2, length, x.device) if tokens is None else Layout.of(tokens)
    mine, theirs = (of(x, layout, monkeypatch, devices) for devices in ((DEVICE,), ()))
    assert len(counted) == 3
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert one.stride() == other.stride()


def test_memory_that_lies_otherwise_and_halves_of_a_row(counted) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 3, 40, 2 * 16, device=DEVICE)
    scheme = Rotary(heads=3, head_width=16)
    layout = Layout.plain(2, 40, whole.device)
    for x in (whole[..., 16:], whole[:, :, ::2, :16], whole[:1, :1, :, :16].expand(2, 3, -1, -1)):
        mine = scheme.turn(x, layout if x.shape[2] == 40 else Layout.plain(2, 20, whole.device))
        position = torch.arange(x.shape[2], device=DEVICE).expand(2, -1)
        exact = Rotary(heads=3, head_width=16).rotate(x.double(), position)
        torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=1e-5)
    assert len(counted) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(counted, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 100, 64, device=DEVICE).to(dtype)
    scheme = Rotary(heads=2, head_width=64)
    position = torch.arange(100, device=DEVICE)[None]
    mine = scheme.rotate(x, position)
    cos, sin = (angle.double().repeat(1, 1, 2)[:, None] for angle in scheme.angles(position, dtype))
    partner = torch.cat([-x[..., 32:], x[..., :32]], -1).double()
    exact = x.double() * cos + partner * sin
    assert counted
    torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_float64_and_no_tokens_go_to_torch(counted) -> None:
    scheme, x = Rotary(heads=1, head_width=4), torch.randn(1, 1, 5, 4, device=DEVICE)
    assert scheme.turn(x.double(), Layout.plain(1, 5, x.device)).dtype == torch.float64
    assert not counted
    assert scheme.turn(x[:, :, :0], Layout.plain(1, 0, x.device)).shape == (1, 1, 0, 4)
