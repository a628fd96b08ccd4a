"""The covered kernel: a pattern of blocks by tiles of all keys of a document, its links as their bias. On a CPU.

Where links cover most of what a query may see at all (many links, or documents hardly longer than what is linked),
gathering each head's own blocks, and filling documents up to whole ones, costs more than multiplying by every key. What
links say between blocks is one small table (short.py), spread to the tokens of a tile when it runs and again in
backward: O(L) memory, where the short kernel keeps its bias, and tiles between two documents or in the future are left
out. Global tokens are in the tiles as all others are. O(L · tokens of a document) time.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from attention_zoo.layout.host import array_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.ragged import ragged
from attention_zoo.layout.reach import Anywhere
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.blocks import columns_to_run, fills_blocks
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.mild import mild_rows
from attention_zoo.ops.pattern.near import needed_pairs, tiles_within
from attention_zoo.ops.pattern.short import PAIRS, Where, table_of
from attention_zoo.ops.softmax.tiles import run_tiles

EVERYTHING = Anywhere()
WORTH = 1.4
"""So many pairs of tiles are taken to cost what one costs that is gathered: a judgement, by which it was faster at
every setting that was timed."""
LITTLE = 0.65
"""Where documents have so few pairs of tokens for each that is gathered, it is the faster one however few of a tile's
pairs are theirs: what is linked to a block is then mostly nothing. By blocks of 2 to 64 and 8 to 800 documents of 4,096
tokens, 1.0 to 1.9 times as fast up to here; from 0.9 on slower."""
DEFINED = 3.0
"""The same of a pair in a tile whose bias is the definition's; not timed."""


def _table_is_small(call: PatternCall) -> str | None:
    where = Where.of(call)
    if len(where.counts) * where.blocks**2 <= PAIRS:
        return None
    return f"too many blocks of {call.blocks.size} for a table, in documents of {len(where.counts)} lengths"


def _covers(call: PatternCall) -> str | None:
    """Whether what is linked costs as much as everything."""
    size, said = 2 * call.pattern.tile, "{} pairs of all keys cost more than those that are linked ({})"
    if fills_blocks(call) is None:
        linked = columns_to_run(call) * _linked(call)
        others, least = int(WORTH * linked), _fewest_pairs(call)
        if call.q.shape[2] == call.k.shape[2] and least <= LITTLE * linked:
            return None
        if least > others:  # tiles of a long row are not even listed
            return said.format(least, others)
    else:  # tiles by the definition are what is left
        others = int(DEFINED * len(needed_pairs(call, size)[0]) * size**2)
    every = len(needed_pairs(call, size, EVERYTHING)[0]) * size**2
    return None if every <= others else said.format(every, others)


def _fewest_pairs(call: PatternCall) -> int:
    """Of queries and keys of one document, a row on the average: no batch has fewer in its tiles."""
    if call.q.shape[2] < call.k.shape[2]:
        return 0
    sizes = ragged(call.keys)[1]
    return int((sizes**2).sum()) // (len(call.q) * (2 if call.pattern.causal else 1))


def _linked(call: PatternCall) -> int:
    """How many keys a query multiplies: those of its blocks, and the global ones of its document."""
    keys = call.keys.host
    marked = keys.is_global & keys.valid
    documents = 1 + (np.diff(keys.document, axis=1) != 0).sum(1)
    return call.blocks.most * call.blocks.size + int((marked.sum(1) / documents).max(initial=0))


def _run(call: PatternCall) -> Tensor:
    where = Where.of(call)
    tiles = tiles_within(call, EVERYTHING, partial(_bias, call, where, table_of(call, where)))
    mild = mild_rows(call, call.k.shape[2] - call.q.shape[2])
    return run_tiles(call.q, call.k, call.v, tiles, scale=call.scale, mild=mild, asked=call.asked, sink=call.sink)


COVERED: Kernel[PatternCall] = Kernel(
    "covered",
    _run,
    (facts.on_cpu, facts.queries_within_keys, facts.own_keys, facts.bias_is_fixed, _table_is_small, _covers),
    "tiles of all keys of a document, links as their bias; backward recomputes",
    (facts.is_blocks,),
)


def _bias(
    call: PatternCall, where: Where, table: Tensor | None, rows: slice, columns: slice | Tensor, batch: slice
) -> Tensor:
    """[b|1, H|1, l, s] of these queries and keys, global ones and those of padding among them: the whole definition."""
    queries, keys = call.queries.cut(rows, batch), call.keys.cut(columns, batch)
    seen = call.seen(queries, keys)
    extra = call.pattern.position_bias(queries, keys)
    if table is None:
        bias = seen.new_zeros((), dtype=torch.promote_types(call.q.dtype, torch.float32)) if extra is None else extra
        return torch.where(seen, bias, -torch.inf)
    bias = _of_links(where, table, rows, columns, batch)
    # passes over as many numbers as there are scores: only where there is something to change
    if where.everyone is not None:
        of_rows, of_columns = (x[batch] if len(x) > 1 else x for x in where.everyone)
        of_rows, of_columns = of_rows[:, rows], of_columns[:, columns]
        if bool(array_of(of_rows).any()) or bool(array_of(of_columns).any()):
            bias.masked_fill_(of_rows[:, None, :, None] | of_columns[:, None, None], 0)
    bias = bias if extra is None else bias + extra
    return bias if bool(array_of(seen).all()) else bias.masked_fill(~seen, -torch.inf)


def _of_links(where: Where, table: Tensor, rows: slice, columns: slice | Tensor, batch: slice) -> Tensor:
    """What links say, [b|1, H|1, l, s], fresh."""
    row, column = (x[batch] if len(x) > 1 else x for x in (where.rows[:, rows], where.columns[:, columns]))
    found = table.new_empty(max(len(row), len(column)), len(table), row.shape[1], column.shape[1])
    for into, mine, theirs in zip(found, row.expand(len(found), -1), column.expand(len(found), -1)):
        # few rows of the table, spread over the keys, then copied to the queries as they are
        some, place = mine.unique_consecutive(return_inverse=True)
        spread = table.index_select(1, some).index_select(2, theirs)
        torch.index_select(spread, 1, place, out=into)
    return found
