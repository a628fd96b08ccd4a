"""What queries see of the keys: for each of them a range of columns, in one key layout or in several.

`Visible` is the product of a call's layouts and a reach: a list of parts, each of them some keys with a layout of their
own and the range of its columns that every query sees. Ranges are found once, on the host, by binary search over
(document, position), which rise along a row; with holes, packed documents or forgotten tokens just as without.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attention_zoo.layout.host import Array, Host, before
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Reach


class Runs(NamedTuple):
    """The valid tokens of a row as runs of one document each, in numbers that rise along the row.

    Fields:
        run: [B, S], which run each column belongs to, counted from 1; 0 before the first.
        place: [B, S], rises with (run, position); at padding that of the token before it.
        stride, lowest: a token of run r at position p stands at r · stride + p - lowest.
        consecutive: whether within each document tokens stand in consecutive columns at consecutive positions.
    """

    run: Int[np.ndarray, "B S"]
    place: Int[np.ndarray, "B S"]
    stride: int
    lowest: int
    consecutive: bool


def runs_of(layout: Layout, lowest: int = 0) -> Runs:
    """Of a layout; `lowest` is the smallest position that may be asked for.

    Raises:
        ValueError: where positions do not rise over the valid tokens of a document.
    """
    return layout.plan(("runs", lowest), lambda: (_one_run if layout.implied else _runs)(layout.host, lowest))


def _one_run(host: Host, lowest: int) -> Runs:
    """Of consecutive tokens of one document: what `_runs` finds, and a short call would wait for."""
    position = host.position
    stride = max(0, int(position[0, -1])) + 1 - lowest if position.size else 1 - lowest
    return Runs(np.ones_like(position), position + (stride - lowest), stride, lowest, True)


def _runs(host: Host, lowest: int) -> Runs:
    position, valid = host.position, host.valid
    column = np.arange(position.shape[1])
    earlier = before(valid)
    previous = earlier.clip(min=0)
    follows = valid & (earlier >= 0) & (host.document == np.take_along_axis(host.document, previous, 1))
    step = position - np.take_along_axis(position, previous, 1)
    if not bool((~follows | (step > 0)).all()):
        raise ValueError("tokens.position must strictly increase over the valid tokens of a document")
    consecutive = bool((~follows | ((earlier == column - 1) & (step == 1))).all())
    run = (valid & ~follows).cumsum(1)
    stride = int(np.where(valid, position, 0).max(initial=0)) + 1 - lowest
    place = np.maximum.accumulate(np.where(valid, run * stride + position - lowest, -1), 1)
    return Runs(run, place, stride, lowest, consecutive)


def first_columns(keys: Layout, oldest: Int[np.ndarray, "B L"], lowest: int = 0) -> Int[np.ndarray, "B L"]:
    """For each of the last L columns, the first one of its document whose position is not before `oldest`.

    One more than its own column at padding.
    """
    if keys.implied:  # columns are positions, but for where they begin
        return (oldest - keys.host.position[:, :1]).clip(0, keys.valid.shape[1])
    runs, L = runs_of(keys, lowest), oldest.shape[1]
    asked = slice(keys.valid.shape[1] - L, None)
    wanted = (runs.run * runs.stride)[:, asked] + oldest.clip(min=lowest) - lowest
    found = np.stack([np.searchsorted(row, at) for row, at in zip(runs.place, wanted)]) if len(wanted) else wanted
    nothing = np.arange(keys.valid.shape[1])[asked] + 1
    return np.where(keys.host.valid[:, asked], found, nothing)


class Seen(NamedTuple):
    """One part of what is visible.

    Fields:
        keys: what its columns are.
        first, stop: [B, L], the columns from `first` up to `stop`, without it, may be seen by each query: of its own
            document, where `reach` and causality allow some. Equal where there are none.
    """

    keys: Layout
    first: Int[np.ndarray, "B L"]
    stop: Int[np.ndarray, "B L"]


Visible = tuple[Seen, ...]


def visible(queries: Layout, *keys: Layout, reach: Reach, causal: bool) -> Visible:
    """What the queries may see of one or several sets of keys whose positions count the same tokens as theirs."""

    def part(each: Layout) -> Seen:
        # the plan keeps what the key's id is of
        key = ("visible", id(each), reach, causal)
        return queries.plan(key, lambda: (_seen(queries, each, reach, causal), each))[0]

    return tuple(map(part, keys))


def _seen(queries: Layout, keys: Layout, reach: Reach, causal: bool) -> Seen:
    mine = queries.host.position
    low = np.full(mine.shape, -1) if reach.farthest is None or reach.first else mine - reach.farthest
    ahead = 0 if causal else reach.farthest_ahead
    far = int(max(keys.host.position.max(initial=0), mine.max(initial=0))) + 1
    return between(queries, keys, low, np.full(mine.shape, far) if ahead is None else mine + ahead + 1)


def between(queries: Layout, keys: Layout, low: Int[np.ndarray, "B L"], high: Int[np.ndarray, "B L"]) -> Seen:
    """For each query the keys of its document at positions from `low` up to `high`, without it."""
    mine, theirs = queries.host, keys.host
    far = int(max(theirs.position.max(initial=0), mine.position.max(initial=0))) + 1
    stride = far + 2
    # documents are counted: ids may be any, and too large to multiply
    known = np.union1d(mine.document, theirs.document)
    place = np.searchsorted(known, theirs.document) * stride + theirs.position
    place = np.maximum.accumulate(np.where(theirs.valid, place, -1), 1)
    first, stop = np.zeros_like(mine.position), np.zeros_like(mine.position)
    for row in range(len(first)):
        base = np.searchsorted(known, mine.document[row]) * stride
        first[row] = np.searchsorted(place[row], base + low[row].clip(0, far + 1))
        stop[row] = np.searchsorted(place[row], base + high[row].clip(0, far + 1))
    stop = np.where(mine.valid, np.maximum(stop, first), first)
    return Seen(keys, first, stop)


def columns_of(seen: Seen, rows: slice) -> Array:
    """Lowest and highest column that one of these queries sees, of any row of the batch: [2]."""
    some = seen.first[:, rows], seen.stop[:, rows]
    there = some[1] > some[0]
    if not bool(there.any()):
        return np.zeros(2, np.int64)
    return np.array([some[0][there].min(), some[1][there].max()])
