"""Taps over tokens equal their sum, written down with pads: outputs, gradients and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attention_zoo.ops.taps import taps


def plain(x: Tensor, weight: Tensor) -> Tensor:
    mixed = torch.zeros_like(x * weight[0])
    for tap in range(len(weight)):
        mixed = mixed + nn.functional.pad(x, (0, 0, tap, 0))[:, : x.shape[1]] * weight[tap]
    return mixed


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 13])
def test_taps_are_their_sum(length: int, width: int) -> None:
    torch.manual_seed(length * width)
    x = torch.randn(3, length, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, 7, dtype=torch.float64, requires_grad=True)
    given = torch.randn(3, length, 7, dtype=torch.float64)
    torch.testing.assert_close(taps(x, weight), plain(x, weight))
    found = torch.autograd.grad(taps(x, weight), (x, weight), given)
    torch.testing.assert_close(found, torch.autograd.grad(plain(x, weight), (x, weight), given))
    assert torch.autograd.gradgradcheck(taps, (x, weight))


def test_columns_that_do_not_lie_side_by_side_will_do() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 9, 3, dtype=torch.float64).transpose(0, 2).requires_grad_()
    weight = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    given = torch.randn(7, 9, 3, dtype=torch.float64).transpose(0, 2)
    torch.testing.assert_close(taps(x, weight), plain(x, weight))
    found = torch.autograd.grad(taps(x, weight), (x, weight), given)
    torch.testing.assert_close(found, torch.autograd.grad(plain(x, weight), (x, weight), given))


def test_no_rows_and_frozen_weights_will_do() -> None:
    assert taps(torch.zeros(0, 3, 2), torch.ones(2, 2)).shape == (0, 3, 2)
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    taps(x, torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [3.0, 3.0, 2.0, 1.0]


def test_the_wider_type_is_the_results() -> None:
    x, weight = torch.randn(2, 5, 4).bfloat16().requires_grad_(), torch.randn(3, 4, requires_grad=True)
    found = taps(x, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(x, weight))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_go_through() -> None:
    """Gradients of each row alone, as of the plain sum."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)

    def loss(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda row, weight: of(row[None], weight).pow(3).sum()

    found, right = (
        torch.func.vmap(torch.func.grad(loss(each), argnums=(0, 1)), (0, None))(x, weight) for each in (taps, plain)
    )
    torch.testing.assert_close(found, right)
