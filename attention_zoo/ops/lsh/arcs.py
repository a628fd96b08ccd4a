"""How often the windows of all rounds show tokens to each other, counted round by round by comparing small integers.

Number the sorted tokens of a document by (bucket, chunk), their *cell*. What a token sees in a round is an arc of the
ring of cells, and whether a cell lies in it takes one subtraction and one comparison, since unsigned integers wrap:

    cell - first <= span

Inside a bucket that does not fill the ring, a window that goes round it shows two arcs. A pair costs a few bytes a
round, however many chunks there are; by products of one-hot rows (ops/lsh/shown.py) it costs a column for each chunk.

Letters as in ops/lsh/chunks.py; A documents and heads, or chunks, whose l queries are compared with s keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer
from torch import Tensor

from attention_zoo.layout.host import Array, array_of
from attention_zoo.ops.lsh.plan import HashedPlan

AT_ONCE = 1 << 19
"""Bytes of the keys that one query is compared with, so that they stay near the cache."""
ROUNDS = 255
"""Rounds that are counted in a byte."""


Arc = tuple[Array, Array | None]
"""The first cell, and how many follow; None: none."""


class Arcs(NamedTuple):
    """Of each token in each round.

    Fields:
        cell: [R, H, M], where it stands; unsigned.
        seen: one arc or two, of the same shape, that its windows show.
    """

    cell: Array
    seen: list[Arc]


def shows_arcs(
    chunks: Integer[np.ndarray, " K"],
    *,
    rounds: int,
    look_back: int,
    look_ahead: int,
    across_rounds: bool,
    filled: bool,
    inside: bool,
) -> bool:
    """Whether windows of documents of so many chunks show arcs of their own round, each key as often as any other.

    Where rounds form one ring, inside buckets: these are never those of another round, and no window comes round to its
    own. Where short rings repeat chunks: there are none, or a chunk is alone.
    """
    if across_rounds and rounds > 1:
        return inside and max(look_back, look_ahead) <= (rounds - 1) * int(chunks.min())
    return not filled or bool(((chunks == 1) | (chunks > look_back + look_ahead)).all())


def has_arcs(plan: HashedPlan) -> bool:
    """See `shows_arcs`."""
    layout = plan.layout
    same: dict[str, Any] = {
        name: getattr(layout, name) for name in ("rounds", "look_back", "look_ahead", "across_rounds", "filled")
    }
    return shows_arcs(_places(plan)[2], **same, inside=plan.inside)


def arcs_of(plan: HashedPlan) -> Arcs:
    """Of a plan that `has_arcs`; in order, unless `order_is_idle`."""
    if order_is_idle(plan):
        bucket = array_of(_buckets(plan)).swapaxes(0, 1)
        cell = bucket.astype(np.promote_types(*(np.min_scalar_type(int(x)) for x in (bucket.min(), bucket.max()))))
        return Arcs(cell, [(cell, None)])
    assert plan.order is not None
    order = array_of(plan.order).swapaxes(0, 1).astype(np.int64)
    M = order.shape[2]
    row = np.arange(0, order.size, M).reshape(*order.shape[:2], 1)
    sorted_arcs = _of_sorted(plan, order + row)
    rank = np.empty(order.shape, np.int64)
    rank.reshape(-1)[order + row] = np.arange(M)

    def back(x: Array) -> Array:
        return x.take(rank if x.size == M else rank + row)

    return Arcs(back(sorted_arcs.cell), each(sorted_arcs.seen, back))


def order_is_idle(plan: HashedPlan) -> bool:
    """Whether a bucket says all: each window holds its whole document."""
    layout, chunks = plan.layout, _places(plan)[2]
    if _is_ring(plan):
        return plan.inside and bool((chunks <= 1 + layout.look_back + layout.look_ahead).all())
    return plan.inside and bool((chunks <= 1 + min(layout.look_back, layout.look_ahead)).all())


def _is_ring(plan: HashedPlan) -> bool:
    """Whether the last chunk of a round stands beside its first."""
    return not plan.layout.across_rounds or plan.layout.rounds == 1


def _buckets(plan: HashedPlan) -> Int[Tensor, "H R M"]:
    assert plan.buckets is not None
    return plan.buckets


def _places(plan: HashedPlan) -> tuple[Integer[np.ndarray, " M"], Integer[np.ndarray, " M"], Integer[np.ndarray, " M"]]:
    """Of each sorted token: where its document starts, its chunk in that document, and how many chunks that has."""
    layout = plan.layout
    if "places" not in layout.kept:
        document, chunk = array_of(layout.document), array_of(layout.slot) // layout.chunk
        start, stop = (np.searchsorted(document, document, side) for side in ("left", "right"))
        every = np.append(chunk, len(layout.neighbours) // layout.rounds)
        fields = start, chunk - chunk[start], every[stop] - chunk[start]
        small = np.int16 if max(len(document), int(fields[2].max())) < 1 << 13 else np.int32
        layout.kept["places"] = tuple(x.astype(small) for x in fields)
    found: tuple[Array, Array, Array] = layout.kept["places"]
    return found


def _of_sorted(plan: HashedPlan, order: Integer[np.ndarray, "R H M"]) -> Arcs:
    """Of the sorted tokens, whose places among all are given; [1, 1, M] where all rounds and heads are alike."""
    _, chunk, chunks = _places(plan)
    # no more than there are, so that sums stay small
    back, ahead = (min(x, int(chunks.max())) for x in (plan.layout.look_back, plan.layout.look_ahead))
    if plan.inside:
        cell, base, least, most, alone = _runs(plan, order)
    else:
        zero = np.zeros_like(chunk)
        cell, base, least, most, alone = (x[None, None] for x in (chunk, zero, zero, chunks - 1, zero == 0))
    ring = _is_ring(plan)
    everything = (chunks <= 1 + back + ahead) & ring
    low, high = chunk - back, chunk + ahead
    early, late = ring & ~everything & (low < 0), ring & ~everything & (high >= chunks)
    first = np.where(everything, least, np.maximum(least, low))
    last = np.where(everything, most, np.minimum(most, high))
    # what a window shows of the other end of the ring
    first_behind = np.where(early, np.maximum(least, low + chunks), least)
    last_behind = np.where(late, np.minimum(most, high - chunks), most)
    behind = (early | late) & (first_behind <= last_behind)
    # where all tokens are of one bucket both are one arc
    first = np.where(behind & alone & early, first_behind, first)
    last = np.where(behind & alone & late, last_behind, last)
    # one number more than there are cells: an arc that starts there holds none
    kind = np.min_scalar_type(int(cell.max()) + 1)
    none = np.iinfo(kind).max

    def placed(first: Array, last: Array, there: Array | bool) -> tuple[Array, Array]:
        begin, span = (base + first - least).astype(kind), (last - first).astype(kind)
        return np.where(there, begin, kind.type(none)), np.where(there, span, kind.type(0))

    seen: list[Arc] = [placed(first, last, True)]
    behind &= ~alone
    if behind.any():
        seen.append(placed(first_behind, last_behind, behind))
    return Arcs(cell.astype(kind), seen)


def _runs(plan: HashedPlan, order: Integer[np.ndarray, "R H M"]) -> tuple[Array, Array, Array, Array, Array]:
    """Of each sorted token its cell; of the tokens of its bucket the first cell, the first chunk and the last, and
    whether they are all of the document.
    """
    start, chunk, _ = _places(plan)
    bucket = array_of(_buckets(plan)).swapaxes(0, 1).take(order)
    M = len(start)
    number = np.arange(M, dtype=start.dtype)
    begins = np.ones(bucket.shape, bool)
    begins[..., 1:] = (bucket[..., 1:] != bucket[..., :-1]) | (start[1:] != start[:-1])
    moves = np.ones(M, bool)
    moves[1:] = (chunk[1:] != chunk[:-1]) | (start[1:] != start[:-1])
    cell = (begins | moves).cumsum(-1, dtype=start.dtype)
    cell -= cell.take(start, -1)
    begin = np.maximum.accumulate(np.where(begins, number, number[:1]), -1)
    ends = np.ones(bucket.shape, bool)
    ends[..., :-1] = begins[..., 1:]
    end = np.minimum.accumulate(np.where(ends, number, number[-1:])[..., ::-1], -1)[..., ::-1]
    last = np.searchsorted(start, start, side="right") - 1
    alone = (begin == start) & (end == last)
    row = np.arange(0, order.size, M).reshape(*order.shape[:2], 1)
    return cell, cell.take(begin + row), chunk.take(begin), chunk.take(end), alone


def times_met(
    cell: Integer[np.ndarray, "R A s"], seen: list[Arc], stops: Integer[np.ndarray, " l"] | None = None
) -> Integer[np.ndarray, "A l s"]:
    """How often the arcs [R, A, l] show each cell.

    Args:
        stops: of each query, how many keys are asked about; what is said of others is 0.
    """
    (R, A, s), rows = cell.shape, seen[0][0].shape[2]
    found = np.zeros((A, rows, s), np.uint8 if R <= ROUNDS else np.int32)
    for start in range(0, R, ROUNDS):
        rounds = slice(start, start + ROUNDS)
        size = max(1, AT_ONCE // (len(cell[rounds]) * s * cell.itemsize))
        for at in range(0, A, size):
            some = slice(at, min(at + size, A))
            _count(cell[rounds, some], each(seen, lambda x, r=rounds, a=some: x[r, a]), stops, found[some])  # type: ignore[misc]
    return found


def each(seen: list[Arc], change: Callable[[Array], Array]) -> list[Arc]:
    """These arcs, all of whose arrays are changed."""
    return [(change(first), None if span is None else change(span)) for first, span in seen]


def _count(
    cell: Array, seen: list[Arc], stops: Integer[np.ndarray, " l"] | None, into: Integer[np.ndarray, "a l s"]
) -> None:
    """Added, one query of each of `a` after the other."""
    R, a, s = cell.shape
    # numpy goes along what lies together, and each start costs as much as some hundred bytes: the fewer, the better
    order = (0, 1, 2) if 3 * R * a < (2 + R.bit_length()) * s else (2, 0, 1)
    cell, seen = _in_order(cell, order), each(seen, lambda x: _in_order(x, (2, 0, 1)))
    place, flags = (_in_order(np.empty(cell.shape, kind), order) for kind in (cell.dtype, np.bool_))
    counts = into if order[0] == 0 else np.zeros((into.shape[1], s, a), np.uint8).transpose(2, 0, 1)
    for first, span in seen:
        for row in range(into.shape[1]):
            stop = s if stops is None else int(stops[row])
            keys, there, flag = cell[..., :stop], place[..., :stop], flags[..., :stop]
            if span is None:
                np.equal(keys, first[..., row, None], out=flag)
            else:
                np.subtract(keys, first[..., row, None], out=there)
                np.less_equal(there, span[..., row, None], out=flag)
            counts[:, row, :stop] += _sum(flag.view(np.uint8))
    if counts is not into:
        into += counts


def _in_order(x: Array, order: tuple[int, ...]) -> Array:
    """The same, contiguous with its axes in this order."""
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def _sum(x: Integer[np.ndarray, "R a s"]) -> Integer[np.ndarray, "a s"]:
    """Over rounds, in place: halves are added, each of which lies together."""
    rounds = len(x)
    while rounds > 1:
        half = rounds // 2
        x[:half] += x[rounds - half : rounds]
        rounds -= half
    return x[0]
