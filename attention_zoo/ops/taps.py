"""A few taps over tokens, each channel for itself: y_p = Σ_j w_j · x_{p-j}, nothing being before the first token.

Its gradients are written down, since autograd of the plain sum pads, multiplies and adds for each tap anew: that was a
tenth of a training step on a CPU. O(L · width · E) time, and one result of the input's size whatever the width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def taps(x: Float[Tensor, "B L E"], weight: Float[Tensor, "width E"]) -> Float[Tensor, "B L E"]:
    """The mix of each token with those before it, in the wider of both types; differentiable any number of times."""
    kind = torch.result_type(x, weight)
    found: Tensor = _Taps.apply(x.to(kind), weight.to(kind))
    return found


class _Taps(torch.autograd.Function):
    generate_vmap_rule = True  # and with `setup_context` also under torch.func, as the plain sum was

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _mixed(x, weight, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            # what a token gave to those behind it: the same taps, the other way round
            of_x = taps(gradient.flip(1), weight).flip(1) if torch.is_grad_enabled() else _mixed(gradient, weight, -1)
        if ctx.needs_input_grad[1]:
            length = x.shape[1]
            of_weight = torch.stack(
                [(gradient[:, tap:] * x[:, : max(length - tap, 0)]).sum((0, 1)) for tap in range(len(weight))]
            )
        return of_x, of_weight


def _mixed(x: Tensor, weight: Tensor, towards: int) -> Tensor:
    """Each token with those before it (`towards` 1), or behind it (-1)."""
    found = x * weight[0]
    for tap in range(1, min(len(weight), x.shape[1])):
        here, there = (found[:, tap:], x[:, :-tap]) if towards > 0 else (found[:, :-tap], x[:, tap:])
        here.addcmul_(there, weight[tap])
    return found
