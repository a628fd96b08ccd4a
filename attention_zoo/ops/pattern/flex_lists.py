"""Which blocks FlexAttention visits, and in which of them every pair is seen, so that it need not ask for each.

Lists are made on the host, once for a layout and pattern, as wide as the longest (never L x L, nor its blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.reach import Anywhere, Band, Blocks
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.flex_links import head_by_head, kept
from attention_zoo.ops.pattern.globals import global_columns
from attention_zoo.ops.pattern.heads import SomeHeads, reach_by_head
from attention_zoo.ops.pattern.near import needed_pairs

Device = torch.device | str


class BlockLists(NamedTuple):
    """For each row of blocks the blocks to visit: how many, [1, #H, n], and which, [1, #H, n, W]."""

    number: Tensor
    blocks: Tensor


class Sides(NamedTuple):
    """Key blocks of each block of queries, and query blocks of each block of keys: in part and wholly seen ones."""

    forth: BlockLists
    back: BlockLists
    whole_forth: BlockLists
    whole_back: BlockLists


class Asking(NamedTuple):
    """Blocks of rows of the call's global queries, behind those of all queries.

    Fields:
        rows: how many.
        columns: how many blocks the tokens of the call's queries have as keys of a second projection, behind all other
            blocks: what these rows see instead of the others; 0: there is none.
    """

    rows: int = 0
    columns: int = 0


NONE = Asking()


def lists_of_pairs(row: Array, column: Array, rows: int, device: Device = "cpu") -> BlockLists:
    """BlockLists from the pairs of blocks that matter, in any order; widths are powers of two."""
    order = np.argsort(row, kind="stable")
    row, column = row[order], column[order]
    count = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - (count.cumsum() - count)[row]
    width = 1 << (max(1, int(count.max(initial=0))) - 1).bit_length()
    index = np.zeros((rows, width), np.int32)
    index[row, place] = column
    return BlockLists(*(tensor_of(x, device) for x in (count[None, None].astype(np.int32), index[None, None])))


def both_sides(call: PatternCall, size: int, rows: int, columns: int, more: int = 0, asking: Asking = NONE) -> Sides:
    """Of the call's blocks of `size`; `rows` and `columns` count fillers, which are in no list.

    Args:
        more: blocks of keys behind these, which all queries visit.
        asking: of global queries.
    """
    key = ("flex lists", call.pattern.reach, call.pattern.causal, id(call.queries), size, rows, columns, more, asking)
    # the plan keeps what the key's id is of
    return call.keys.plan(key, lambda: (_both_sides(call, size, (rows, columns, more), asking), call.queries))[0]


def _both_sides(call: PatternCall, size: int, counts: tuple[int, int, int], asking: Asking) -> Sides:
    if isinstance(call.pattern.reach, Blocks):
        return kept(call, ("flex lists", size, *counts, asking), lambda: _by_links(call, size, counts, asking))
    back = reach_by_head(call.pattern.reach)
    if back is None:
        return _sides(call, size, counts, asking)
    found = {}
    for far in set(back):
        heads = tuple(head for head, other in enumerate(back) if other == far)
        found[far] = _sides(replace(call, pattern=SomeHeads(call.pattern, heads)), size, counts, asking)
    return Sides(*(_by_head([found[far][n] for far in back]) for n in range(len(Sides._fields))))


def _by_links(call: PatternCall, size: int, counts: tuple[int, int, int], asking: Asking) -> Sides:
    found = [_sides(each, size, counts, asking) for each in head_by_head(call)]
    return Sides(*(_by_head([each[n] for each in found]) for n in range(len(Sides._fields))))


def _by_head(lists: list[BlockLists]) -> BlockLists:
    """One of each head, as wide as the widest."""
    widest = max(one.blocks.shape[-1] for one in lists)
    blocks = [F.pad(one.blocks, (0, widest - one.blocks.shape[-1])) for one in lists]
    return BlockLists(torch.cat([one.number for one in lists], 1), torch.cat(blocks, 1))


def _sides(call: PatternCall, size: int, counts: tuple[int, int, int], asking: Asking) -> Sides:
    rows, columns, more = counts
    row, column = _pairs(call, size, rows, columns)
    near, local = seen_whole(call, row, column, size), np.arange(-(-call.lengths[0] // size))
    found = [(row, column, near), _all_of(local, columns, more)]
    if asking.rows:
        found += [*_of_rows(call, size, counts, asking)]
    row, column, whole = (np.concatenate(each) for each in zip(*found))
    lists, device = [], call.q.device
    for some in (~whole, whole):
        lists.append(lists_of_pairs(row[some], column[some], rows + asking.rows, device))
        lists.append(lists_of_pairs(column[some], row[some], columns + more + asking.columns, device))
    return Sides(*lists)


Pairs = tuple[Array, Array, Bool[np.ndarray, " n"]]
"""Row and column of blocks, and which of them are seen whole."""


def _all_of(rows: Array, start: int, count: int) -> Pairs:
    """Each of these rows with so many columns from one on."""
    row = rows.repeat(count)
    return row, start + np.tile(np.arange(count), len(rows)), np.zeros(len(row), bool)


def _of_rows(call: PatternCall, size: int, counts: tuple[int, int, int], asking: Asking) -> Iterator[Pairs]:
    """What rows of global queries visit: what is of their documents, and not later where that matters."""
    rows, columns, more = counts
    keys = call.keys.host
    held, start = keys._replace(valid=keys.valid & ~keys.is_global), 0
    if asking.columns:
        held, start = call.queries.host, columns + more
    else:
        yield _all_of(rows + np.arange(asking.rows), columns, more)
    chosen = global_columns(call.queries)[1].host
    q_low, q_high, q_first, q_last, _ = (x[:, :, None] for x in _valid_ends(chosen, size))
    k_low, k_high, k_first, k_last, filled = (x[:, None] for x in _valid_ends(held, size))
    seen = (q_last >= k_first) & (k_last >= q_first)
    # a row of the batch without global queries has fillers alone, which must meet no padding
    whole = filled & (q_last >= 0) & (q_first == q_last) & (k_first == q_first) & (k_last == q_first)
    if call.pattern.causal:
        seen, whole = seen & (k_low <= q_high), whole & (k_high <= q_low)
    row, column = np.nonzero(seen.any(0))
    yield rows + row, start + column, whole.all(0)[row, column]


def _pairs(call: PatternCall, size: int, rows: int, columns: int) -> tuple[Array, Array]:
    if facts.is_band(call.pattern) is not None or not call.aligned:
        return needed_pairs(call, size)
    # columns are positions: row i sees columns i + offset - back ... i + offset + ahead
    L, S = call.lengths
    first = np.arange(0, L, size)
    last = np.minimum(first + size, L) - 1
    back = call.band.farthest
    low = (first + S - L - back).clip(0) // size
    high = (last + S - L + (0 if call.pattern.causal else back)).clip(max=S - 1) // size
    count = (high - low + 1).clip(0)
    row = np.arange(len(first)).repeat(count)
    return row, low[row] + np.arange(len(row)) - (count.cumsum() - count)[row]


def seen_whole(call: PatternCall, row: Array, column: Array, size: int) -> Bool[np.ndarray, " n"]:
    """Of which of these blocks every query sees every key, in every row of the batch."""
    reach = call.pattern.reach
    band = isinstance(reach, Band) and reach.same_for_all and reach.contiguous
    if reach.weights != "uniform" or not (band or isinstance(reach, Anywhere)):
        return np.zeros(len(row), bool)
    keys = call.keys.host
    queries, held = _ends(call.queries.host, size), _ends(keys._replace(valid=keys.valid & ~keys.is_global), size)
    q_low, q_high, q_first, q_last = (x[:, row] for x in queries)
    k_low, k_high, k_first, k_last = (x[:, column] for x in held)
    whole = (q_first >= 0) & (q_first == q_last) & (k_first == q_first) & (k_last == q_first)
    if call.pattern.causal:
        whole &= k_high <= q_low
    if isinstance(reach, Band):
        whole &= (q_high - k_low <= reach.farthest) & (k_high - q_low <= reach.farthest_ahead)
    return np.asarray(whole.all(0))


def _ends(tokens: Host, size: int) -> tuple[Int[np.ndarray, "B n"], ...]:
    """Lowest and highest position and document in each block; a place without a token is of document -1."""

    def ends(x: Array, fill: int) -> tuple[Array, Array]:
        blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill).reshape(len(x), -1, size)
        return blocks.min(-1), blocks.max(-1)

    return *ends(tokens.position, 0), *ends(np.where(tokens.valid, tokens.document, -1), -1)


def _valid_ends(tokens: Host, size: int) -> tuple[Array, ...]:
    """Lowest and highest position and document of the tokens that are there, and whether all of a block are: [B, n].

    Where none is, the lowest is the largest number and the highest is -1, so that no range meets it.
    """
    around = ((0, 0), (0, -tokens.valid.shape[1] % size))
    there = np.pad(tokens.valid, around).reshape(len(tokens.valid), -1, size)
    found = []
    for x in (tokens.position, tokens.document):
        blocks = np.pad(x, around).astype(np.int64).reshape(there.shape)
        found.append(np.where(there, blocks, np.iinfo(np.int64).max).min(-1))
        found.append(np.where(there, blocks, -1).max(-1))
    return *found, there.all(-1)
