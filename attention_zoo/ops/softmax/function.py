"""What the autograd functions of this package share: exact arithmetic under autocast, and no second derivatives.

torch's own `once_differentiable` marks only what the backward returns. Where that is added to another path, as in
x + layer(x), `autograd.grad` goes past the mark and the missing term is silently zero. Hence `differentiable_once`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a forward without autocast, which would round the float32 sums inside to half precision."""

    @wraps(forward)
    def guarded(ctx: Any, first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return forward(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return forward(ctx, first, *rest)

    return guarded


def zeros_for(like: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """What comes of no rows, no queries or no keys: zeros, with a gradient of zeros for each of the inputs."""
    dtype, kind = like.dtype, like.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    zeros = torch.zeros(like.shape, dtype=dtype, device=like.device)
    for each in inputs:
        zeros = zeros + each.flatten()[:0].sum().to(dtype)
    return zeros


def watch(out: Tensor, fields: Iterable[Tensor]) -> Tensor:
    """`out`, whose backward raises if these tensors were written to by then, as it does for what autograd saved.

    For what a state shares with backward: it is handed to the caller without a copy. Costs neither operators nor
    memory: a tensor that nobody else keeps is read by nobody.
    """
    if not out.requires_grad:
        return out
    seen = [(weakref.ref(field), field._version) for field in fields if not field.is_inference()]

    def check(_: Tensor) -> None:
        for reference, version in seen:
            field = reference()
            if field is not None and field._version != version:
                raise RuntimeError(
                    "tokens of a state that are needed for gradient computation have been modified by an inplace "
                    "operation: run backward first, or change a copy"
                )

    out.register_hook(check)
    return out


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward(ctx, saved, *grads) a node of its own, tied to all that it reads, that raises in turn.

    The saved tensors are handed over because checkpointing lets them be unpacked only once. Runs without autocast.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = grads, ctx.saved_tensors
        kind = next(each for each in chain(*tensors) if each is not None).device.type
        # who records nothing (create_graph=False) can ask for no second derivative: a node is some 50 µs
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(kind):
            return backward(ctx, tensors[1], *grads)
        return _Guard.apply(kind, backward, ctx, len(grads), *grads, *tensors[1])

    return guarded


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, kind: str, backward: Callable[..., Any], ctx: Any, count: int, *tensors: Any) -> Any:
        with torch.autocast(kind, enabled=False):
            return backward(ctx, tensors[count:], *tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("this attention kernel has no second derivatives; kernel=dense has, where there is one")
