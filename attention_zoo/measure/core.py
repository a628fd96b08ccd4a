"""The core of a mechanism: its attention on given queries, keys and values, without the projections.

It is what `attend` does on a layer; which operands that takes, the mechanism says (`Attention.core`).
"""

from __future__ import annotations

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
        Unsupported: for a mechanism without one.
    """
    given = layer.core(shape.batch, shape.length)
    if given is None:
        raise Unsupported(layer.name, "variant=core", "it has no attend(q, k, v)", "variant=layer")
    operands = tuple(torch.randn(size, device=shape.device, dtype=shape.dtype) for size in given.shapes)
    if given.by_rows:
        operands = tuple(_rows_first(each) for each in operands)
    attend: Any = layer.attend
    out_shape = shape.batch, layer.heads, shape.length, layer.head_width
    return Core(operands, attend, out_shape, shape.length, given.parameters, given.seen)


def _rows_first(x: Tensor) -> Tensor:
    """The same [B, H, L, D], but [B, L, H, D] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
