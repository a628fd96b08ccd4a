"""The core of a mechanism: its attention on given queries, keys and values, without the projections.

It is what `attend` does on a layer, on operands as its signature names them:

    q, k, v        a pattern
    qk, v          queries and keys are the same vectors (LSH); hashing and sorting are part of the call
    q, k, v, r     with keys of distances: a stretch that begins a segment, its memory in front, full
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.contract import Attention, Unsupported


class Shape(NamedTuple):
    """What the inputs of a cell look like."""

    batch: int
    length: int
    device: torch.device
    dtype: torch.dtype


@dataclass
class Core:
    """One attention and what it is given.

    Fields:
        operands: leaves, in the layout in which this code gets them from its projections.
        call: operands -> output.
        out_shape: of the output.
        tokens: queries of each row.
        parameters: what gets gradients besides the operands.
        seen: tokens that come before the call's, of which some are among the keys.
        writes_inputs: whether the call writes into its operands.
    """

    operands: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    out_shape: tuple[int, ...]
    tokens: int
    parameters: tuple[Tensor, ...] = ()
    seen: int = 0
    writes_inputs: bool = False


def core_of(layer: Attention, shape: Shape) -> Core:
    """The core of one of our layers, on random operands.

    Raises:
        Unsupported: for a mechanism without `attend`, or one that asks for operands of another kind.
    """
    attend: Any = getattr(layer, "attend", None)
    given = inspect.signature(attend).parameters.values() if attend else ()
    names = tuple(each.name for each in given if each.default is each.empty)
    B, L, H, D = shape.batch, shape.length, layer.heads, layer.head_width
    before = memory_columns(layer) if names == ("q", "k", "v", "r") else 0
    sizes = {
        "q": (B, H, L, D), "qk": (B, H, L, D), "k": (B, layer.kv_heads, before + L, D),
        "v": (B, layer.kv_heads, before + L, D), "r": (distances(layer), H, D),
    }  # fmt: skip
    if not names or not sizes.keys() >= set(names):
        raise Unsupported(layer.name, "variant=core", "it has no attend(q, k, v)", "variant=layer")
    operands = tuple(torch.randn(sizes[name], device=shape.device, dtype=shape.dtype) for name in names)
    if names[:3] != ("q", "k", "v") or "r" in names:  # these work on rows, as projections write them; patterns on heads
        operands = tuple(_rows_first(each) for each in operands)
    parameters = tuple(each for name, each in layer.named_parameters(recurse=False)) if "r" in names else ()
    return Core(operands, attend, (B, H, L, D), L, parameters, whole_segments(layer, before))


def _rows_first(x: Tensor) -> Tensor:
    """The same [B, H, L, D], but [B, L, H, D] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x


def memory_columns(layer: Any) -> int:
    """Keys in front of the first query's segment."""
    return int(layer.memory_length)


def distances(layer: Any) -> int:
    """How many distances a query may be from a key; 0 where a mechanism has no keys of distances."""
    return int(getattr(layer, "segment_length", 0)) + int(getattr(layer, "memory_length", 0))


def whole_segments(layer: Any, columns: int) -> int:
    """So many tokens as end on a segment's border and hold these columns."""
    return -(-columns // layer.segment_length) * layer.segment_length if columns else 0
