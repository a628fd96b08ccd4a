"""One softmax over several sets of keys on CUDA: torch's FlexAttention over all of them, put behind each other.

A query sees of each set up to two ranges of columns, which the mask looks up; blocks that no query sees are left out,
and in blocks that all see whole the mask is not asked. Made on the host, once for a layout. How many operators a call
takes does not depend on its length, nor on how many ranges there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.kernel import triton_reason
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.visible import Seen
from attention_zoo.ops.pattern import flex
from attention_zoo.ops.pattern.flex_joined import cut, filled
from attention_zoo.ops.pattern.flex_lists import Sides, lists_of_pairs
from attention_zoo.ops.pattern.key_set import Keys

RANGES = 2
"""Of one set, that a query may see."""


class Set(NamedTuple):
    """What is to be known of a set of keys, but for the vectors; see `Keys`.

    Fields:
        columns: how many keys.
        seen: ranges of them for each query; None: all, for all.
    """

    columns: int
    layout: Layout | None
    weight: Float[Tensor, "B S"] | None
    seen: Sequence[Seen | None]


class Plan(NamedTuple):
    """What follows from the layouts; P sets, S columns of all of them and of fillers at the end.

    Fields:
        part: which set a column is of; P where nothing is.
        low, high: columns that each query sees of each set, up to two ranges; of P none.
        lists: blocks to visit.
        weight: [B, S], added to the scores; None: nothing.
    """

    part: Int[Tensor, "B S"]
    low: Int[Tensor, "r B P+1 L"]
    high: Int[Tensor, "r B P+1 L"]
    lists: Sides
    weight: Float[Tensor, "B S"] | None


def refuse(q: Tensor, sets: Sequence[Keys]) -> str | None:
    """Why it cannot run these, or None."""
    if reason := refuse_queries(q):
        return reason
    if any(len(each.seen or ()) > RANGES for each in sets):
        return f"it looks up {RANGES} ranges of a set"
    if any(each.weight is not None and each.weight.requires_grad for each in sets):
        return "weights learn, which it would sum in no fixed order"
    return None


def refuse_queries(q: Tensor) -> str | None:
    """Why it cannot run these queries, whatever the keys, or None."""
    return triton_reason(q.device) or flex.refuse(q)


def columns_for(sizes: Sequence[int]) -> int:
    """How many columns sets of so many keys have together, with fillers behind them."""
    return flex.bucket(sum(sizes))


def run(
    q: Float[Tensor, "B H L D"],
    queries: Layout,
    sets: Sequence[Keys],
    seen: Sequence[Sequence[Seen | None]],
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """As `attend_to_several`, of which `seen` are the ranges of each set; None: all of its columns."""
    first = sets[0].k
    known = [Set(each.k.shape[2], each.layout, each.weight, ranges) for each, ranges in zip(sets, seen)]
    sizes = [each.columns for each in known]
    B, K, _, D = first.shape
    shape = B, K, columns_for(sizes) - sum(sizes), D
    # zeros, kept so that they cost nothing where layers share a layout
    filler = queries.plan(("filler", shape, first.dtype), lambda: first.new_zeros(()).expand(shape))
    k, v = (torch.cat([*x, filler], 2) for x in ([each.k for each in sets], [each.v for each in sets]))
    return run_joined(q, queries, k, v, known, scale)


def run_joined(
    q: Float[Tensor, "B H L D"],
    queries: Layout,
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    sets: Sequence[Set],
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """The same, where keys and values of all sets stand behind each other already, filled up to `columns_for`; their
    channels may be, too, to `channels_for`."""
    L, D = q.shape[2:]
    kept = [x for each in sets for x in (*each.seen, each.layout, each.weight)]
    key = ("several", tuple(each.columns for each in sets), q.dtype, *map(id, kept))
    # the plan keeps what the key's ids are of
    plan: Plan = queries.plan(key, lambda: (_plan(q, queries, sets), kept))[0]
    part, low, high, lists, weight = plan

    def shown(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        of = part[b, j]
        first = (low[0, b, of, i] <= j) & (j < high[0, b, of, i])
        return first | ((low[1, b, of, i] <= j) & (j < high[1, b, of, i]))

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value if weight is None else value + weight[b, j]

    functions = shown, None if weight is None else score
    channels = flex.channels_for(D)
    k, v = (filled(x, x.shape[2], channels) for x in (k, v))
    out, _ = flex.attend(filled(q, flex.bucket(L), channels), k, v, lists, functions, scale)
    return cut(out, L, D)


def _plan(q: Tensor, queries: Layout, sets: Sequence[Set]) -> Plan:
    (B, _, L, _), block, device = q.shape, flex.BLOCK, q.device
    sizes = [each.columns for each in sets]
    rows, starts, columns = flex.bucket(L), np.cumsum([0, *sizes]), columns_for(sizes)
    low = np.zeros((RANGES, B, len(sets) + 1, rows), np.int32)
    high, part = np.zeros_like(low), np.full((B, columns), len(sets), np.int32)
    asks = queries.host.valid
    for n, each in enumerate(sets):
        some = slice(starts[n], starts[n + 1])
        part[:, some] = n if each.layout is None else np.where(each.layout.host.valid, n, len(sets))
        for r, one in enumerate(each.seen):
            first, stop = (0, each.columns) if one is None else (one.first, one.stop)
            low[r, :, n, :L] = first + starts[n]
            high[r, :, n, :L] = np.where(asks, stop + starts[n], first + starts[n])
    weight = None
    if any(each.weight is not None for each in sets):
        exact = torch.promote_types(q.dtype, torch.float32)
        weights = [q.new_zeros(B, each.columns) if each.weight is None else each.weight for each in sets]
        weight = torch.cat([*(x.to(exact) for x in weights), q.new_zeros(B, columns - starts[-1], dtype=exact)], 1)
    padded = np.pad(asks, ((0, 0), (0, rows - L)))
    lists = _lists(low, high, padded, part < len(sets), block, device)
    return Plan(tensor_of(part, device), tensor_of(low, device), tensor_of(high, device), lists, weight)


def _lists(low: Array, high: Array, asks: Array, there: Array, block: int, device: torch.device) -> Sides:
    """Blocks in which some query sees a key, and those in which each query sees every key."""
    n, m = asks.shape[1] // block, there.shape[1] // block
    some = high > low
    rows = (*low.shape[:3], n, block)
    first = np.where(some, low, there.shape[1]).reshape(rows).min((1, 4))
    last = np.where(some, high - 1, -1).reshape(rows).max((1, 4))
    low, high = low.reshape(rows).max((1, 4)), high.reshape(rows).min((1, 4))
    asked, held = (np.atleast_1d(x.reshape(len(x), -1, block).all((0, 2))) for x in (asks, there))
    full = asked[:, None] & held
    begin = np.arange(m) * block
    visited = ((first[..., None] < begin + block) & (last[..., None] >= begin)).any((0, 1))
    whole = full & ((low[..., None] <= begin) & (high[..., None] >= begin + block)).any((0, 1))
    lists = []
    for which in (visited & ~whole, whole):
        row, column = which.nonzero()
        lists += [lists_of_pairs(row, column, n, device), lists_of_pairs(column, row, m, device)]
    return Sides(*lists)
