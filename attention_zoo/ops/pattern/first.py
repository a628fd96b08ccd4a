"""The first tokens of each document, kept for all later ones beside a band (attention sinks): one more part per tile.

Tiles of a band hold what is near. The few first keys are gathered once, for all tiles; what a tile's own keys show
already is hidden from them, so that each key counts once. O(L · first).

Positions may be counted in a cache of these tokens and the band (`Band.in_cache`; Xiao et al. 2023, §3.2): among the
keys of a band distances are what they are in the text, and to the first tokens they grow no more once the cache is
full. A query beyond then asks them as the newest token of a full cache: turned by another position (`turned`), or with
another position bias. Global tokens are where they are in the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Band, Reach
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import Pattern, PatternCall
from attention_zoo.ops.pattern.globals import most_keys, same_documents
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile
from attention_zoo.tokens import Tokens


def without_first(call: PatternCall) -> PatternCall:
    """The call of the band alone, where first tokens can be a part of their own; see `with_first_keys`."""
    if not call.pattern.reach.first or facts.is_band_and_first(call.pattern) or call.learned:
        return call
    return replace(call, pattern=BandAlone(call.pattern))


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
                bias = partial(_bias, call, rows, keys, some)
                parts.append(Part(piece, bias, turned=call.turned is not None))
        found.append(tile._replace(parts=[*tile.parts, *parts]))
    return found


class BandAlone:
    """A pattern without its first tokens: what it shows of tokens that are none."""

    def __init__(self, pattern: Pattern):
        assert isinstance(pattern.reach, Band)
        self.pattern, self.causal, self.tile, self.first = pattern, pattern.causal, pattern.tile, pattern.reach.first
        self.reach: Reach = replace(pattern.reach, first=0, in_cache=False)

    @property
    def has_position_bias(self) -> bool:
        return self.pattern.has_position_bias

    def bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        later = (tokens._replace(position=tokens.position + self.first) for tokens in (queries, keys))
        return self.pattern.bias(*later)

    def scores_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        bias, extra = self.bias(queries, keys), self.position_bias(queries, keys)
        return bias if extra is None else bias + extra

    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None:
        return self.pattern.position_bias(queries, keys)

    def full_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        raise NotImplementedError("a band alone is no definition")


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
    if not (queries.valid.any() and mine.valid.any()):
        return False
    asked, there = queries.position[queries.valid], mine.position[mine.valid]
    before, after = int(asked.max() - there.min()), int(there.max() - asked.min())
    far = before > reach.farthest or (not call.pattern.causal and after > reach.farthest_ahead)
    return far or max(reach.strides) > 1


def _bias(call: PatternCall, rows: slice, keys: Layout, some: slice, batch: slice) -> Tensor:
    """The pattern's own, without what the band shows."""
    queries, mine = call.queries.cut(rows, batch), keys.cut(some, batch)
    hidden = (BandAlone(call.pattern).bias(queries, mine) > -torch.inf) | ~call.seen(queries, mine)
    return call.pattern.scores_bias(queries, mine).masked_fill(hidden, -torch.inf)


def with_first_as_global(call: PatternCall) -> PatternCall:
    """The call with its first tokens marked as keys that all see, where queries are turned for them."""
    if call.turned is None:
        return call
    first = call.pattern.reach.first

    def find() -> Layout:
        host = call.keys.host
        return call.keys.with_globals(host.is_global | ((host.position < first) & host.valid))

    keys = call.keys.plan(("first as global", first), find)
    return replace(call, keys=keys, turned=call.turned if keys.any_global else None)


def taken_first(given: Layout, first: int, columns: Int[Tensor, "B n"]) -> Bool[Tensor, "B 1 n 1"]:
    """Which of some columns are of first tokens that are not global themselves."""
    return ((given.position < first) & ~given.is_global).gather(1, columns)[:, None, :, None]


# --- positions in a cache --------------------------------------------------------------------------------------------


def turned_queries(
    reach: Reach, q: Float[Tensor, "B H L D"], layout: Layout, turn: Callable[[Tensor, Layout], Tensor]
) -> Float[Tensor, "B H L D"] | None:
    """Queries, not rotated yet, as the first tokens see them; None: as all others do."""
    if not (isinstance(reach, Band) and reach.in_cache):
        return None
    newest = reach.newest
    # a layout of its own, so that what follows from these positions is found once for all layers, too
    key = "in cache", newest
    held = layout.plan(key, lambda: Layout.fresh(layout._replace(position=layout.position.clamp(max=newest))))
    turned = turn(q, held)
    return None if turned is q else turned


def turned_bias(call: PatternCall) -> Float[Tensor, "B H L S"]:
    """By how much scores of the first tokens differ where queries are turned, if products are of the others."""
    assert call.turned is not None
    exact = torch.promote_types(call.q.dtype, torch.float32)
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1).to(exact)
    more = (call.turned.to(exact) - call.q.to(exact)) @ k.transpose(-1, -2) * call.scale
    return more.where(_of_first(call.band, call.queries, call.keys), 0)


def position_bias_in_cache(
    reach: Reach, bias: Callable[[Tokens], Tensor], queries: Tokens, keys: Tokens
) -> Float[Tensor, "#B H L S"]:
    """A scheme's bias of these keys, as a function of the queries, with the first tokens' distances as in a cache."""
    found = bias(queries)
    if not (isinstance(reach, Band) and reach.in_cache):
        return found
    if isinstance(keys, Layout) and keys.implied and keys.start >= reach.first:
        return found
    newest = bias(queries._replace(position=queries.position.clamp(max=reach.newest)))
    return torch.where(_of_first(reach, queries, keys), newest, found)


def _of_first(reach: Band, queries: Tokens, keys: Tokens) -> Bool[Tensor, "B 1 L S"]:
    """Which pairs are of a first token, and of no global one."""
    first = (keys.position < reach.first) & ~keys.is_global
    return (first[:, None, :] & ~queries.is_global[:, :, None])[:, None]
