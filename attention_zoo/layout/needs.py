"""What each process needs of a sequence that several processes own: the columns that its queries may see.

Derived from the reach of a mechanism, the tokens and nothing else, by every process for all of them, so that nobody has
to ask. Needs are unions of ranges, per head where heads differ (random blocks, learned spans), and hold no padding.

Queries that see everything (global tokens, whole rows of blocks) are left out: keys do not travel to them, they travel
to the keys; see `everyone`.

Letters: B batch, L columns of the whole sequence, n columns of one process, K key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from attention_zoo.layout.host import Array, Host, array_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Anywhere, Band, Blocks, Either, Reach, Tiles
from attention_zoo.layout.visible import between

Columns = Sequence[Int[np.ndarray, " n"]]
Needs = tuple[Bool[np.ndarray, "#K L"], ...]
"""For each process which columns it needs, of each key head or of all; its own among them."""


def needs(whole: Layout, columns: Columns, reach: Reach, *, causal: bool, key_heads: int = 1, heads: int = 1) -> Needs:
    """What the queries of each process may see.

    Args:
        whole: with those tokens marked that a pattern makes global.
        columns: of each process.
        key_heads, heads: K and H; consecutive query heads share a key head.
    """
    key = ("needs", reach, causal, key_heads, heads, *map(id, columns))

    def find() -> tuple[Needs, Columns, Reach]:
        asks = whole.host.valid & ~seers(whole, reach)
        parts = reach.parts if isinstance(reach, Either) else (reach,)
        finders = [_finder(part, whole, causal, key_heads, heads) for part in parts]
        return tuple(_of_one(whole.host, each, asks, causal, finders, reach.first) for each in columns), columns, reach

    # the plan keeps what the key's ids are of
    return whole.plan(key, find)[0]


def seers(whole: Layout, reach: Reach) -> Bool[np.ndarray, "B L"]:
    """Which valid tokens see everything in their document (causal: behind them): global ones, and whole rows."""
    host = whole.host
    found = host.is_global & host.valid
    for part in reach.parts if isinstance(reach, Either) else (reach,):
        if isinstance(part, Blocks) and part.whole is not None:
            found = found | (host.valid & part.whole(host.position // part.size, part.blocks_of(host.length)))
    return found


def needs_everything(reach: Reach) -> bool:
    """Whether queries may see all of their document, so that keys should pass by rather than be gathered."""
    if isinstance(reach, Either):
        return any(map(needs_everything, reach.parts))
    return not isinstance(reach, Blocks) and (reach.farthest is None or reach.farthest_ahead is None)


def meet(
    host: Host, ones: Int[np.ndarray, " n"], asks: Bool[np.ndarray, "B L"], *, after: bool, causal: bool
) -> Bool[np.ndarray, "B L"]:
    """Which columns share a document with one of these columns that `asks`, no later (`after`) or no earlier than it.

    Args:
        after: True: a column of `ones` that is not before it; False: one that is not behind it. Two-sided: anywhere.
    """
    found = np.zeros(host.valid.shape, bool)
    every = np.arange(host.valid.shape[1])
    for row in range(len(found)):
        mine = ones[asks[row, ones]]
        if not len(mine):
            continue
        document, theirs = host.document[row, mine], host.document[row]
        # documents never fall along the valid columns of a row
        at = np.searchsorted(document, theirs, side="right") - 1 if after else np.searchsorted(document, theirs)
        there = (at >= 0) & (at < len(mine))
        at = at.clip(0, len(mine) - 1)
        there &= (document[at] == theirs) & host.valid[row]
        if causal:
            there &= mine[at] >= every if after else mine[at] <= every
        found[row] = there
    return found


# --- one process -----------------------------------------------------------------------------------------------------


class _Asking(NamedTuple):
    """The queries of one process."""

    columns: Int[np.ndarray, " n"]
    asks: Bool[np.ndarray, "B n"]


def _of_one(
    host: Host, columns: Array, asks: Array, causal: bool, finders: Sequence[partial[Array]], first: int
) -> Bool[np.ndarray, "#K L"]:
    shared = meet(host, columns, asks, after=True, causal=causal)
    asking = _Asking(columns, asks[:, columns])
    found = finders[0](asking)
    for finder in finders[1:]:
        found = found | finder(asking)
    always = host.is_global | (host.position < first) if first else host.is_global
    return np.asarray(((found | always) & shared).any(1))


def _finder(part: Reach, whole: Layout, causal: bool, key_heads: int, heads: int) -> partial[Array]:
    """A function of the queries of one process: [K|1, B, L], which keys they may see, or a few more."""
    if isinstance(part, Band):
        return partial(_in_ranges, [_ranges(whole, *ends, causal) for ends in _ends_by_head(part, key_heads, heads)])
    if isinstance(part, Blocks):
        return partial(_linked, whole.host, part, key_heads)
    if isinstance(part, Anywhere) or part.farthest is None or part.farthest_ahead is None:
        return partial(_everything, whole)
    return partial(_near, whole.host, part, _ranges(whole, part.farthest, part.farthest_ahead, causal))


def _everything(whole: Layout, asking: _Asking) -> Array:
    return whole.host.valid[None]


def _ends_by_head(band: Band, key_heads: int, heads: int) -> list[tuple[int, int]]:
    """How far back and ahead each key head is seen; one pair where all are seen alike."""

    def by_key_head(count: int | tuple[int, ...]) -> Array:
        each = np.asarray(count) * np.asarray(band.stride)
        return np.broadcast_to(each, (heads,)).reshape(key_heads, -1).max(1)

    back = by_key_head(band.back)
    ahead = back if band.ahead is None else by_key_head(band.ahead)
    ends = [(int(a), int(b)) for a, b in zip(back, ahead)]
    return ends if len(set(ends)) > 1 else ends[:1]


def ranges_of(whole: Layout, reach: Band, causal: bool) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """For every query the first column within a band, of any head, and the one behind the last."""
    return _ranges(whole, reach.farthest, reach.farthest_ahead, causal)


def _ranges(whole: Layout, back: int, ahead: int, causal: bool) -> tuple[Array, Array]:
    """For every query of the whole sequence the range of columns within reach."""

    def find() -> tuple[Array, Array]:
        position = whole.host.position
        seen = between(whole, whole, position - back, position + 1 + (0 if causal else ahead))
        return seen.first, seen.stop

    return whole.plan(("ranges", back, ahead, causal), find)


def _in_ranges(ranges: Sequence[tuple[Array, Array]], asking: _Asking) -> Array:
    return np.stack([_union(*each, asking) for each in ranges])


def _union(first: Array, stop: Array, asking: _Asking) -> Bool[np.ndarray, "B L"]:
    """Which columns are in one of the ranges of these queries."""
    B, L = first.shape
    found = np.zeros((B, L), bool)
    first, stop = first[:, asking.columns], stop[:, asking.columns]
    for row in range(B):
        begins, ends = first[row, asking.asks[row]], stop[row, asking.asks[row]]
        if not len(begins):
            continue
        low, high = int(begins.min()), int(ends.max())
        change = np.bincount(begins - low, minlength=high - low + 1) - np.bincount(ends - low, minlength=high - low + 1)
        found[row, low:high] = change.cumsum()[: high - low] > 0
    return found


def _near(host: Host, reach: Reach, ranges: tuple[Array, Array], asking: _Asking) -> Array:
    """Of a reach of which nothing else is known: within its farthest ends, and near by what it says of tiles."""
    found = _union(*ranges, asking)
    for row, column in enumerate(found):
        at = column.nonzero()[0]
        mine = asking.columns[asking.asks[row]]
        seen = np.zeros(len(at), bool)
        # one tile of queries for each run of consecutive columns of one document
        starts = (np.diff(mine) != 1) | (np.diff(host.document[row, mine]) != 0)
        for run in np.split(mine, starts.nonzero()[0] + 1):
            if not len(run):
                continue
            position, key = host.position[row, run], host.position[row, at]
            low, high = (np.full((1, 1, 1), end) for end in (position.min(), position.max()))
            length = np.full((1, 1, 1), host.length[row, run[0]])
            near = reach.near(Tiles(low, high, key[None, None], key[None, None], length, max(1, len(run))))
            seen |= near[0, 0] & (host.document[row, at] == host.document[row, run[0]])
        found[row, at] = seen
    return found[None]


def _linked(host: Host, reach: Blocks, key_heads: int, asking: _Asking) -> Bool[np.ndarray, "K B L"]:
    """Columns of the blocks that some query of each key head's is linked to."""
    B, L = host.valid.shape
    found = np.zeros((key_heads, B, L), bool)
    for row in range(B):
        mine = asking.columns[asking.asks[row]]
        if not len(mine):
            continue
        block, blocks = host.position[row, mine] // reach.size, reach.blocks_of(host.length[row, mine])
        asked = np.unique(np.stack([host.document[row, mine], block, blocks]), axis=1)
        links, weight = (array_of(x)[0] for x in reach.lists(asked[1][None], asked[2][None]))  # [H, R, m]
        documents = np.unique(asked[0])
        known = documents[np.searchsorted(documents, host.document[row]).clip(max=len(documents) - 1)]
        place = np.searchsorted(documents, host.document[row])
        stride = int(max(host.position[row].max() // reach.size, links.max(initial=0))) + 1
        key = np.where(
            (known == host.document[row]) & host.valid[row], place * stride + host.position[row] // reach.size, -1
        )
        linked = np.where(weight > -np.inf, np.searchsorted(documents, asked[0])[None, :, None] * stride + links, -2)
        by_head = np.broadcast_to(linked, (max(len(linked), key_heads), *linked.shape[1:])).reshape(key_heads, -1)
        for head, each in enumerate(by_head):
            found[head, row] = np.isin(key, each)
    return found
