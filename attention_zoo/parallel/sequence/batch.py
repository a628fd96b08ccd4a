"""A batch whose columns are cut over the processes of a group: what each reads, and which columns those are.

    part = sharded(batch, group, model)                  # the same batch on every process; own columns out
    output = model(part.ids, part.tokens)                # part.tokens knows the whole sequence and who owns what
    loss = losses(output, part, counts(batch))           # this process's share: the sum over the group is the loss
    loss.backward()
    sum_gradients(model.parameters(), group)

Columns may be cut anywhere and unevenly; where mechanisms think in segments, cuts at their borders send the least.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.layout.host import Array
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import needs_everything
from attention_zoo.layout.placement import Placement, zigzag
from attention_zoo.model.placed import OPTION, beyond_columns
from attention_zoo.tasks.task import IGNORED, Batch
from attention_zoo.tokens import Tokens


def sharded(batch: Batch, group: Any, model: nn.Module) -> Batch:
    """This process's columns of a batch that all processes of the group have.

    Args:
        batch: where its columns shall be, ids [B, L] and targets [B, L]; rows are not cut.
        group: of `torch.distributed`; None: all processes.
        model: what will read it: its mechanisms say how columns are best cut.

    Raises:
        Unsupported: for a batch that is not one of columns: a source, or labels of rows.
    """
    if batch.source is not None:
        raise Unsupported("an encoder-decoder", OPTION, "a source's columns are not cut", f"{OPTION}=1")
    if batch.labels or batch.targets.shape != batch.ids.shape:
        raise Unsupported("a label of a row", OPTION, "it is read off all columns of the row", f"{OPTION}=1")
    size = dist.get_world_size(group)
    missing = size - batch.ids.shape[1]
    tokens = batch.tokens
    if tokens is None:
        tokens = Layout.plain(batch.ids.shape[0], batch.ids.shape[1], batch.ids.device)
    if missing > 0:  # every process has a column, be it of padding
        tokens, batch = _padded(tokens, missing), batch.each(lambda x: _wider(x, batch.ids.shape, missing))
    placement = Placement.of(tokens, group, columns_for(model, tokens.valid.shape[1], size))

    def own(tensor: Tensor) -> Tensor:
        return placement.take(tensor) if tensor.shape == batch.ids.shape else tensor

    return batch._replace(tokens=None).each(own)._replace(tokens=placement.own)


def _padded(tokens: Tokens, missing: int) -> Tokens:
    fields = (nn.functional.pad(field, (0, missing)) for field in tokens)
    return Tokens(*fields)


def _wider(x: Tensor, shape: torch.Size, missing: int) -> Tensor:
    """Ids, types and targets; behind the last column nothing is asked."""
    if x.shape != shape:
        return x
    return nn.functional.pad(x, (0, missing), value=0 if x.dtype == torch.bool else IGNORED)


def columns_for(model: nn.Module, length: int, size: int) -> tuple[Array, ...]:
    """Which columns each of `size` processes has: in runs (`borders_for`), or zig-zag where all attention is by rings,
    whose causal work that balances."""
    if is_of_rings(model) and length >= 2 * size:  # each process has a column at least
        return zigzag(length, size)
    return tuple(np.arange(a, b) for a, b in pairwise(borders_for(model, length, size)))


def is_of_rings(model: nn.Module) -> bool:
    """Whether all that needs more than its own column is a causal ring."""
    return all(map(_is_causal_ring, beyond_columns(model)))


def borders_for(model: nn.Module, length: int, size: int) -> list[int]:
    """Where runs of columns begin, and the last one ends.

    They are about as long as each other, and cut at borders of segments if all mechanisms that have segments agree on
    them and each process gets one at least.
    """
    found = [each for each in model.modules() if isinstance(each, Attention)]
    lengths: set[Any] = {getattr(each, "segment_length", None) for each in found} - {None}
    grain = math.lcm(*lengths) if lengths else 1
    if grain == 1 or length < grain * size:
        return [length * rank // size for rank in range(size + 1)]
    return [*(round(length * rank / size / grain) * grain for rank in range(size)), length]


def _is_causal_ring(layer: Any) -> bool:
    if not isinstance(layer, PatternAttention) or layer.travels is None:
        return False
    return layer.causal and needs_everything(layer.reach)
