"""Rows of a shard that need no key of another process: computed while keys are still under way.

Of a band over a run of columns these are all but those near its ends. They are one call on the own keys alone; the rows
near the ends are calls of their own, on the few keys that they see, once these are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import ranges_of
from attention_zoo.layout.reach import Band, Reach
from attention_zoo.ops.pattern.call import PatternCall

WORTH = 0.5
"""Least share of the rows: below, more calls cost more than they hide."""


class Cut(NamedTuple):
    """Rows of queries, and a run of the keys that holds all that they see; where causal, it ends with theirs."""

    rows: slice
    keys: slice


class Cuts(NamedTuple):
    """Rows that need no key of others, of the own keys; and the others, of all keys, before and behind them.

    Fields:
        kept: which rows of `alone` these are. Two-sided it is all rows on all own keys, since kernels of a band want
            queries that end with their keys: a few rows more are computed, and left out.
    """

    alone: Cut
    kept: slice
    rest: tuple[Cut, ...]


def cuts_of(
    whole: Layout, own: Int[np.ndarray, " L"], columns: Int[np.ndarray, " S"], reach: Reach, causal: bool
) -> Cuts | None:
    """None: such rows are too few to be worth it, or cannot be told from others.

    Args:
        own: columns of the whole sequence that are the rows.
        columns: that are the keys, the own ones among them.
    """
    if not isinstance(reach, Band) or reach.first or whole.any_global or not len(own):
        return None
    if own[-1] - own[0] + 1 != len(own):
        return None
    first, stop = (each[:, own] for each in ranges_of(whole, reach, causal))
    asks = whole.host.valid[:, own]
    a, b = _longest(((first >= own[0]) & (stop <= own[-1] + 1) | ~asks).all(0))
    if b - a < WORTH * len(own):
        return None

    def cut(start: int, stop_: int, held: Int[np.ndarray, " S"]) -> Cut:
        rows = slice(start, stop_)
        seen = asks[:, rows]
        low = int(first[:, rows].min(where=seen, initial=own[start]))
        high = int(own[stop_ - 1] + 1 if causal else stop[:, rows].max(where=seen, initial=own[stop_ - 1] + 1))
        return Cut(rows, slice(*np.searchsorted(held, [low, high]).tolist()))

    rest = [cut(start, stop_, columns) for start, stop_ in ((0, a), (b, len(own))) if stop_ > start]
    every = slice(0, len(own))
    if causal:
        return Cuts(cut(a, b, own), slice(0, b - a), tuple(rest))
    return Cuts(Cut(every, every), slice(a, b), tuple(rest))


def _longest(mask: Bool[np.ndarray, " n"]) -> tuple[int, int]:
    """The longest run of True, from the first up to the second, without it."""
    change = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    if not len(starts):
        return 0, 0
    best = int((stops - starts).argmax())
    return int(starts[best]), int(stops[best])


def part_of(call: PatternCall, cut: Cut) -> PatternCall:
    """The call of some rows on some keys."""
    rows, keys = cut
    turned = None if call.turned is None else call.turned[:, :, rows]
    return replace(
        call,
        q=call.q[:, :, rows],
        k=call.k[:, :, keys],
        v=call.v[:, :, keys],
        queries=call.queries.columns(rows),
        keys=call.keys.columns(keys),
        turned=turned,
    )


def in_order(
    run: Callable[[PatternCall], Tensor], alone: PatternCall, whole: Callable[[], PatternCall], cuts: Cuts
) -> Tensor:
    """The output of all rows.

    Args:
        run: of a call.
        alone: the call on the own keys.
        whole: waits for the others' keys: the call on all of them.
    """
    found = {cuts.alone.rows.start + cuts.kept.start: run(part_of(alone, cuts.alone))[:, :, cuts.kept]}
    call = whole()
    for cut in cuts.rest:
        found[cut.rows.start] = run(part_of(call, cut))
    # none of the keys that came may be left out, even if none did: backward sends gradients the way back
    B, H, _, D = alone.q.shape
    tied = (call.k[:, :, :0] + call.v[:, :, :0]).reshape(B, 0, H, D).to(next(iter(found.values())).dtype)
    # as the next projection reads it
    return torch.cat([*(found[start].transpose(1, 2) for start in sorted(found)), tied], 1).transpose(1, 2)
