"""Which keys the queries of segments with a memory see, and the chunks that they run in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.visible import first_columns
from attention_zoo.ops.relative.chunks import ChunkPlan, chunk_borders, plan_chunks

KEPT = 4096
"""Most columns of a call whose plan is kept for later calls of the same shape."""


class Lengths(NamedTuple):
    """All that says which keys a query sees.

    Fields:
        segment, memory: tokens.
        same_length: whether each query sees exactly as many as the memory holds, and itself.
        lowest: the lowest position that there may be.
    """

    segment: int
    memory: int
    same_length: bool
    lowest: int

    def oldest(self, position: Any) -> Any:
        """The oldest position that a token there sees; may be negative."""
        start = position if self.same_length else position - position % self.segment
        return start - self.memory


class Segments(NamedTuple):
    """Where the keys of each query begin: the first column that it sees, and the first of its own segment, [B, L].

    One more than its own column where it sees nothing.
    """

    first: Int[np.ndarray, "B L"]
    own: Int[np.ndarray, "B L"]


def segments_of(keys: Layout, length: int, lengths: Lengths) -> Segments:
    """Of the last `length` columns of the keys."""

    def find() -> Segments:
        host = keys.host.cut(slice(keys.valid.shape[1] - length, None))
        at = np.where(host.valid, host.position, 0)
        border = at - at % lengths.segment
        return Segments(*(first_columns(keys, start, lengths.lowest) for start in (lengths.oldest(at), border)))

    return keys.plan(("segments", length, *lengths), find)


def plan_of(keys: Layout, length: int, kernel: str, lengths: Lengths) -> ChunkPlan:
    """The last `length` columns as queries, in chunks: once for all layers that see alike.

    Of a call without tokens it follows from the shape, and is kept: a short call would wait for it.
    """
    columns = keys.valid.shape[1]
    if keys.implied and kernel == "shift" and columns <= KEPT:
        return _implied(columns, keys.start, length, lengths, keys.valid.device)
    return keys.plan(("chunks", length, kernel, *lengths), lambda: _cut(keys, length, kernel, lengths))


@lru_cache(maxsize=16)
def _implied(columns: int, start: int, length: int, lengths: Lengths, device: torch.device) -> ChunkPlan:
    return _cut(Layout.plain(1, columns, device, start), length, "shift", lengths)


def _cut(keys: Layout, length: int, kernel: str, lengths: Lengths) -> ChunkPlan:
    first, own = segments_of(keys, length, lengths)
    columns, device = keys.valid.shape[1], keys.valid.device
    if kernel == "triton":
        # no pair is farther apart than this
        farthest = lengths.memory + (1 if lengths.same_length else lengths.segment)
        starts = tensor_of(first, device), tensor_of(own, device)
        from attention_zoo.ops.relative.triton import Starts

        return ChunkPlan(*starts, (), min(columns, farthest), None, None, Starts(*starts, columns))
    # chunks follow the segments of the first row: its queries need no key that its own segment does not
    mine = keys.host.cut(slice(columns - length, None))
    query = int(mine.valid[0].argmax())
    phase = int(mine.position[0, query]) - query
    borders = chunk_borders(length, lengths.segment, phase)
    return plan_chunks(first, own, borders, columns, keys=keys if kernel == "gather" else None, device=device)
