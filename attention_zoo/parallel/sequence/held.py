"""What a process holds and computes of a model, a column: counted of calls at two lengths, a line through them.

Counted is what autograd keeps for backward, every storage once, parameters and buffers aside: what a kernel computes
again is not among it, nor what it needs on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.contract import Attention
from attention_zoo.layout.layout import Layout
from attention_zoo.measure.flops import LinearFlops, attention_flops, count_pairs
from attention_zoo.model.wrapper import Wrapper

LENGTHS = 1 << 11, 1 << 12
"""At which calls are counted: longer than windows and segments are by default."""
PAIRS = 1 << 12, 1 << 13
"""At which pairs of queries and keys are."""


class Column(NamedTuple):
    """Of a stack, one column of one row, all layers.

    Fields:
        kept: bytes that wait for backward.
        flops: of projections and feed-forward layers, forward and backward.
    """

    kept: float
    flops: float


def column(model: Any, dtype: torch.dtype) -> Column:
    """Of the model's stack."""
    found = [_counted(model, length, dtype) for length in LENGTHS]
    return Column(*((high - low) / (LENGTHS[1] - LENGTHS[0]) for low, high in zip(*found)))


def _counted(model: Any, length: int, dtype: torch.dtype) -> tuple[float, float]:
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive = []  # so that no storage comes to stand where another was

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    x = torch.randn(1, length, model.dim, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), LinearFlops(model) as linear:
        out = model.stack(x, Layout.plain(1, length))
    del out
    return float(sum(storages.values())), 3.0 * linear.flops


def core_flops(layer: Attention) -> Callable[[int], float]:
    """FLOPs of a layer's scores and weighted values, forward and backward, by the length of a row.

    Raises:
        ValueError: for a mechanism of which no pairs are known.
    """
    found = [count_pairs(layer, length) for length in PAIRS]
    if any(pairs is None for pairs in found):
        if isinstance(layer, Wrapper) and isinstance(layer.inner, Attention):
            return core_flops(layer.inner)
        raise ValueError(f"{layer.name} says nothing of its pairs")
    low, high = (float(pairs) / length for pairs, length in zip(found, PAIRS) if pairs is not None)
    # a column meets so many more when the row doubles, or grows by so much, as the mechanism declares
    growth: dict[str, Callable[[int], float]] = {
        "quadratic": lambda n: n / PAIRS[0] - 1, "loglinear": lambda n: math.log2(n / PAIRS[0])
    }  # fmt: skip
    more = growth.get(layer.abilities.compute)

    def flops(length: int) -> float:
        each = high if more is None else low + (high - low) * more(length)
        return 3.0 * attention_flops(length * each, batch=1, heads=layer.heads, head_width=layer.head_width)

    return flops
