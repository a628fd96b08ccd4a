"""Projections of which a mechanism needs more than their outputs: two streams of gradients, or the matrix itself.

Both can be had of a plain `nn.Linear` in one pass. Whatever else stands in its place (an adapter, a pruned, quantised
or sharded layer, one with hooks) is called as the module that it is, so that it has its effect and its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as registered
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from attention_zoo.ops.softmax.function import differentiable_once
from attention_zoo.place import place_of

_TENSORS = nn.Parameter, Tensor


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of this module is x · weightᵀ + bias and nothing else, and so may be computed past it."""
    if type(layer) not in (nn.Linear, NonDynamicallyQuantizableLinear) or "forward" in vars(layer):
        return False  # torch's own attention has the second kind
    # asked in each call of a layer, hence name by name
    mine = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if mine or registered._global_forward_hooks or registered._global_forward_pre_hooks:
        return False
    if registered._global_backward_hooks or registered._global_backward_pre_hooks:
        return False
    bias = layer.bias
    return type(layer.weight) in _TENSORS and (bias is None or type(bias) in _TENSORS)


def of_zeros(layer: nn.Module, width: int, like: Tensor) -> Float[Tensor, " E"]:
    """What a projection makes of a vector of so many zeros."""
    if not is_plain(layer):
        return layer(like.new_zeros(1, width))[0]
    return like.new_zeros(layer.out_features) if layer.bias is None else layer.bias  # type: ignore[return-value]


def streams(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """layer(x), once, as two streams of the same numbers (they share memory: never write into them).

    Returns:
        The first hands its gradient to what the layer learns alone, the second to x alone.
    """
    if is_plain(layer):
        return project_streams(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    if not torch.is_grad_enabled() or not x.requires_grad:
        y = layer(x)
        return y, y.detach()
    border = x.detach().requires_grad_()
    return _Streams.apply(x, border, layer(border))


def project_streams(
    x: Float[Tensor, "B S E"], weight: Float[Tensor, "F E"], bias: Float[Tensor, " F"] | None
) -> tuple[Float[Tensor, "B S F"], Float[Tensor, "B S F"]]:
    """x · weightᵀ + bias, once, as two streams of the same numbers (they share memory: never write into them).

    Returns:
        The first hands its gradient to weight and bias alone, the second to x alone.
    """
    return _Project.apply(x, weight, bias)


def streams_of_several(x: Tensor, *layers: nn.Module) -> tuple[Tensor, Tensor]:
    """What `streams` gives of each layer, side by side: of plain ones by one product."""
    if all(map(is_plain, layers)):
        return _Project.apply(x, *(layer.weight for layer in layers), *(layer.bias for layer in layers))
    several = (streams(layer, x) for layer in layers)
    first, second = (torch.cat(parts, -1) for parts in zip(*several))
    return first, second


class _Project(torch.autograd.Function):
    """Of several projections of the same x, side by side: their weights, then their biases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, *layers[: len(layers) // 2])
        y = torch.nn.functional.linear(x, *_side_by_side(layers))
        return y, y.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], for_weight: Tensor, for_x: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = saved
        need_x, *needed = ctx.needs_input_grad
        n, sizes = len(weights), [len(weight) for weight in weights]
        dtypes = [weight.dtype for weight in weights]
        # under autocast the gradient is narrower than what was saved
        dx = (for_x @ _one(weights).to(for_x.dtype)).to(x.dtype) if need_x else None
        flat = for_weight.flatten(0, 1)
        dweights = _parts(flat.T @ x.flatten(0, 1).to(flat.dtype), sizes) if any(needed[:n]) else [None] * n
        dbiases = _parts(flat.sum(0), sizes) if any(needed[n:]) else [None] * n
        found = [
            each.to(dtype) if each is not None and need else None
            for each, dtype, need in zip([*dweights, *dbiases], dtypes * 2, needed)
        ]
        return dx, *found


def _side_by_side(layers: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Of weights, then biases."""
    n = len(layers) // 2
    weights, biases = [each for each in layers[:n] if each is not None], layers[n:]
    if all(bias is None for bias in biases):
        return _one(weights), None
    present = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases)]
    return _one(weights), _one(present)


def _one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _parts(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(sizes)


class _Streams(torch.autograd.Function):
    """Of y, which a module computed from `border`: x again, where a graph of its own begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(border, y)
        return y.detach(), y.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], for_weight: Tensor, for_x: Tensor) -> tuple[Tensor | None, ...]:
        border, y = saved
        # through the module's graph twice: here for x, and by the caller's engine for what the module learns
        (dx,) = torch.autograd.grad(y, border, for_x, retain_graph=True, allow_unused=True)
        return dx, None, for_weight


def joined(
    width: int, dtype: torch.dtype, *layers: nn.Module
) -> tuple[Float[Tensor, "F E"], Float[Tensor, " F"] | None]:
    """Projections of the same E = `width` features as one: their weights and biases below each other, in this dtype.

    Of whatever stands in the place of a plain one both are asked for by a call: what it makes of nothing and of each
    feature alone.
    """
    pairs = [_matrix(layer, width) for layer in layers]
    if all(bias is None for _, bias in pairs):
        return torch.cat([weight for weight, _ in pairs]).to(dtype), None
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs]
    return torch.cat([weight for weight, _ in pairs]).to(dtype), torch.cat(biases).to(dtype)


def _matrix(layer: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    if is_plain(layer):
        return layer.weight, layer.bias  # type: ignore[return-value]
    device, dtype = place_of(layer)
    bias = layer(torch.zeros(1, width, device=device, dtype=dtype))
    return (layer(torch.eye(width, device=device, dtype=dtype)) - bias).T, bias[0]
