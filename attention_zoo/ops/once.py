"""Backwards that can be run, but not differentiated again: whoever tries is told, instead of getting a wrong number.

torch's own `once_differentiable` marks only what the backward returns. Where that is added to another path, as in
x + layer(x), `autograd.grad` goes past the mark and the missing term is silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of an autograd function a node of its own, tied to all that it reads, that raises in turn."""

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Any:
        return _Guard.apply(backward, ctx, len(grads), *grads, *ctx.saved_tensors)

    return guarded


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, backward: Callable[..., Any], ctx: Any, count: int, *tensors: Tensor) -> Any:
        return backward(ctx, *tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("this attention kernel has no second derivatives; kernel=dense has, where there is one")
