"""The first tokens of each document, kept for all later ones beside a band (attention sinks): one more part per tile.

Tiles of a band hold what is near. The few first keys are gathered once, for all tiles; what a tile's own keys show
already is hidden from them, so that each key counts once. O(L · first).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import most_keys, same_documents
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile


def with_first_keys(call: PatternCall, local: list[Tile]) -> list[Tile]:
    """The tiles of a band, each of which also sees the first keys of its documents."""
    first = call.pattern.reach.first
    if not first:
        return local
    columns, keys = call.keys.plan(("first", first), lambda: _first_columns(call.keys, first))
    width, found = most_keys(call, call.pattern.tile), []
    pieces: dict[tuple[int, int], Tensor] = {}
    runs = [tile.rows for tile in local if isinstance(tile.rows, slice)]
    for tile, rows, near in zip(local, runs, same_documents(call, call.queries.host, runs, keys.host), strict=True):
        parts = []
        for a in range(near.start, near.stop, width):
            some = slice(a, min(a + width, near.stop))
            # the same tensor for all tiles: it is then gathered once
            piece = pieces.setdefault((some.start, some.stop), columns[:, some])
            if _any_far(call, rows, keys, some):
                parts.append(Part(piece, partial(_bias, call, rows, keys, some)))
        found.append(tile._replace(parts=[*tile.parts, *parts]))
    return found


def _first_columns(layout: Layout, first: int) -> tuple[Tensor, Layout]:
    """Columns of the first tokens of each row's documents, and what they are; fillers marked invalid at the end.

    Global ones are left out: all see them anyhow.
    """
    host = layout.host
    mask = host.valid & (host.position < first) & ~host.is_global
    order = np.argsort(~mask, axis=1, kind="stable")[:, : int(mask.sum(1).max(initial=0))]
    chosen = host.take(order).only(np.take_along_axis(mask, order, 1))
    device = layout.valid.device
    return tensor_of(order, device), Layout.known(chosen, device)


def _any_far(call: PatternCall, rows: slice, keys: Layout, some: slice) -> bool:
    """Whether some query may see one of these keys that its own tile does not show; in a band with gaps it may."""
    reach, queries, mine = call.band, call.queries.host.cut(rows), keys.host.cut(some)
    if max(reach.strides) > 1 or not (queries.valid.any() and mine.valid.any()):
        return max(reach.strides) > 1
    asked, there = queries.position[queries.valid], mine.position[mine.valid]
    before, after = int(asked.max() - there.min()), int(there.max() - asked.min())
    return before > reach.farthest or (not call.pattern.causal and after > reach.farthest_ahead)


def _bias(call: PatternCall, rows: slice, keys: Layout, some: slice, batch: slice) -> Tensor:
    """The pattern's own, without what the band shows: which is what it would show of tokens that are not the first."""
    queries, mine = call.queries.cut(rows, batch), keys.cut(some, batch)
    first = call.pattern.reach.first
    later = (tokens._replace(position=tokens.position + first) for tokens in (queries, mine))
    hidden = (call.pattern.bias(*later) > -torch.inf) | ~call.seen(queries, mine)
    return call.pattern.scores_bias(queries, mine).masked_fill(hidden, -torch.inf)
