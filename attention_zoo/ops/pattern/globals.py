"""Global tokens of a pattern: their keys as parts of every tile, their queries as rows that see everything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from attention_zoo.layout.host import Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.ops.softmax.function import differentiable_once
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.rows import attend_rows
from attention_zoo.ops.softmax.tiles import Rows, Tile, run_tiles, scores_at_once
from attention_zoo.tokens import Tokens

TILE_PAIRS = 1 << 12
"""So many more pairs of a row and a key cost about what one more tile does."""
FUSED_ROWS = 1024
"""Global queries in one fused call: bounds its mask."""


def most_keys(call: PatternCall, rows: int) -> int:
    """Most keys of a part for so many rows, so that no step holds more scores than it should."""
    return max(64, scores_at_once(call.q) // (call.q.shape[1] * max(1, rows)))


def cuts(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """The range in as few pieces of at most `most` as there can be, all of about the same size."""
    count = -(-(stop - start) // most)
    borders = [start + (stop - start) * piece // count for piece in range(count)] + [stop]
    return list(pairwise(borders))


def global_columns(layout: Layout) -> tuple[Int[Tensor, "B n"], Layout]:
    """Columns of each row's global tokens, in order, and what they are; fillers marked invalid at the end."""

    def find() -> tuple[Tensor, Layout]:
        order, chosen = global_order(layout)
        device = layout.valid.device
        return tensor_of(order, device), Layout.known(chosen, device)

    return layout.plan("global columns", find)


def global_order(layout: Layout) -> tuple[Int[np.ndarray, "B n"], Host]:
    """The same on the host."""
    return layout.plan("global order", lambda: _global_order(layout))


def _global_order(layout: Layout) -> tuple[np.ndarray, Host]:
    mask = layout.host.is_global & layout.host.valid
    row, order = mask.nonzero()
    count = len(row) // max(1, len(mask))
    if len(row) == count * len(mask) and bool((row.reshape(len(mask), count) == np.arange(len(mask))[:, None]).all()):
        order = order.reshape(len(mask), count)  # each row has as many
        return order, layout.host.take(order)
    order = np.argsort(~mask, axis=1, kind="stable")[:, : int(mask.sum(1).max(initial=0))]
    chosen = layout.host.take(order)
    return order, chosen._replace(valid=chosen.valid & np.take_along_axis(mask, order, 1))


def _global_places(layout: Layout) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where rows [B, H, n, D] of global queries are, which of them are there, and which fill up; None: all are."""

    def find() -> tuple[Tensor, Tensor | None, Tensor | None]:
        columns, chosen = global_columns(layout)
        columns, valid = columns[:, None, :, None], chosen.valid[:, None, :, None]
        return (columns, None, None) if chosen.dense else (columns, valid, ~valid)

    return layout.plan("global places", find)


def _global_queries(call: PatternCall) -> Tensor:
    columns, _, _ = _global_places(call.queries)
    return call.q.gather(2, columns.expand(-1, call.q.shape[1], -1, call.q.shape[3]))


class GlobalKeys:
    """The global keys of a call, to be parts of its tiles."""

    def __init__(self, call: PatternCall):
        self.call = call
        self.columns, self.chosen = global_columns(call.keys)
        self.width, self.all_seen = most_keys(call, call.pattern.tile), hides_nothing(call, self.chosen)
        self.pieces: dict[tuple[int, int], Tensor] = {}  # the same tensor for all tiles: it is then gathered once

    def parts(self, rows: slice, some: slice) -> list[Part]:
        """What queries at these rows see of some of the keys."""
        return [self._part(rows, a, b) for a, b in cuts(some.start, some.stop, self.width)]

    def _part(self, rows: slice, a: int, b: int) -> Part:
        columns = self.pieces.setdefault((a, b), self.columns[:, a:b])
        if self.all_seen:
            return Part(columns, no_bias)
        call, keys, some = self.call, self.chosen, slice(a, b)
        if _all_seen_by(call, rows, keys.host.cut(some)):
            return Part(columns, no_bias)
        return Part(columns, lambda batch: _some_bias(call, call.queries.cut(rows, batch), keys, some, batch))


def with_global_keys(call: PatternCall, local: list[Tile]) -> list[Tile]:
    """The tiles, each of which also sees the global keys of its documents."""
    if not call.any_global_key:
        return local
    keys = GlobalKeys(call)
    runs = [tile.rows for tile in local if isinstance(tile.rows, slice)]
    near = same_documents(call, call.queries.host, runs, keys.chosen.host)
    return [tile._replace(parts=[*tile.parts, *keys.parts(_span(tile), some)]) for tile, some in zip(local, near)]


def with_global_queries(call: PatternCall, local: list[Tile]) -> list[Tile]:
    """The tiles, and those that decide the rows of global queries."""
    if not call.any_global_query:
        return local
    columns, queries = global_columns(call.queries)
    tiles = _everyone_tiles(call, queries)
    return [*local, *(Tile(Rows(columns[:, _span(t)], queries.valid[:, _span(t)]), t.parts) for t in tiles)]


def _span(tile: Tile) -> slice:
    assert isinstance(tile.rows, slice)
    return tile.rows


def same_documents(call: PatternCall, queries: Host, rows: Sequence[slice], keys: Host) -> list[slice]:
    """For each run of query rows, the key columns among which all keys of their documents are.

    Without it a row of many documents, each with global tokens, would cost the square of its length.
    """
    if call.one_document:
        return [slice(0, keys.valid.shape[1])] * len(rows)
    low = np.where(queries.valid, queries.document, np.iinfo(np.int64).max)
    high = np.where(queries.valid, queries.document, -1)
    # documents never fall along a row
    ordered = np.maximum.accumulate(np.where(keys.valid, keys.document, -1), 1)
    found = []
    for run in rows:
        lows, highs = low[:, run].min(1), high[:, run].max(1)
        start = min(int(np.searchsorted(row, at)) for row, at in zip(ordered, lows))
        stop = max(int(np.searchsorted(row, at, side="right")) for row, at in zip(ordered, highs))
        found.append(slice(start, stop))
    return found


def no_bias(batch: slice) -> None:
    """Of a part whose keys are all seen: None."""


def hides_nothing(call: PatternCall, keys: Layout) -> bool:
    """Whether `everyone_bias` is zero at these keys."""
    return keys.dense and _hides_padding_alone(call)


def _hides_padding_alone(call: PatternCall) -> bool:
    return not call.pattern.causal and call.one_document and not call.has_position_bias


def _all_seen_by(call: PatternCall, rows: slice, keys: Host) -> bool:
    """Whether all of these queries see all of these keys: of their document, and of their past where that matters."""
    if call.has_position_bias or not (call.queries.dense and bool(keys.valid.all())):
        return False
    queries = call.queries.host.cut(rows)
    document = queries.document[:, :1]
    if not (call.one_document or bool((queries.document == document).all() and (keys.document == document).all())):
        return False
    return not call.pattern.causal or bool((keys.position.max(1) <= queries.position.min(1)).all())


def _some_bias(call: PatternCall, queries: Tokens, keys: Layout, some: slice, batch: slice) -> Tensor | None:
    """`everyone_bias` of some of the keys, or None where it would be all zeros."""
    if _hides_padding_alone(call) and bool(keys.host.valid[batch, some].all()):
        return None
    return everyone_bias(call, queries, keys.cut(some, batch))


def everyone_bias(call: PatternCall, queries: Tokens, keys: Tokens) -> Tensor:
    """Between a global token and anyone: the position bias, padding, document and causality, but no pattern."""
    extra = call.pattern.position_bias(queries, keys)
    zero = call.q.new_zeros((), dtype=torch.promote_types(call.q.dtype, torch.float32)) if extra is None else extra
    return torch.where(call.seen(queries, keys), zero, -torch.inf)


def _everyone_tiles(call: PatternCall, queries: Layout) -> list[Tile]:
    """Tiles of queries that see everything; their rows count the given queries."""
    size, all_seen = 2 * call.pattern.tile, hides_nothing(call, call.keys)

    def part(rows: slice, keys: slice) -> Part:
        if all_seen:
            return Part(keys, no_bias)
        return Part(keys, lambda batch: _some_bias(call, queries.cut(rows, batch), call.keys, keys, batch))

    return [
        Tile(rows, [part(rows, slice(a, b)) for a, b in cuts(some.start, some.stop, most_keys(call, size))])
        for rows, some in _runs_of_documents(call, queries, size)
    ]


def _runs_of_documents(call: PatternCall, queries: Layout, size: int) -> list[tuple[slice, slice]]:
    """At most `size` rows each, and the keys of their documents: several documents together only if these are short."""
    document = queries.host.document
    borders = [0, *(1 + np.flatnonzero((document[:, 1:] != document[:, :-1]).any(0))).tolist(), document.shape[1]]
    if call.one_document:
        borders = [0, document.shape[1]]
    pieces = [slice(a, min(a + size, stop)) for start, stop in pairwise(borders) for a in range(start, stop, size)]
    found: list[tuple[slice, slice]] = []
    for rows, keys in zip(pieces, same_documents(call, queries.host, pieces, call.keys.host)):
        if found and rows.stop - found[-1][0].start <= size:
            last, seen = found[-1]
            both = slice(last.start, rows.stop), slice(min(seen.start, keys.start), max(seen.stop, keys.stop))
            if _pairs(*both) <= _pairs(last, seen) + _pairs(rows, keys) + TILE_PAIRS:
                found[-1] = both
                continue
        found.append((rows, keys))
    return found


def _pairs(rows: slice, keys: slice) -> int:
    return (rows.stop - rows.start) * (keys.stop - keys.start)


def with_global_rows(call: PatternCall, out: Tensor, *, in_one: bool = False) -> Tensor:
    """The result of a pattern's local part, with the rows of global queries put over it; see `global_rows`."""
    return put_global_rows(call, out, global_rows(call, in_one=in_one)) if call.any_global_query else out


def global_rows(call: PatternCall, *, in_one: bool = False) -> Tensor:
    """What the call's global queries see, [B, H, n, D] in the order of `global_columns`: everything.

    Args:
        in_one: whether few operators decide them, as on CUDA, and not tiles.
    """
    q, (_, queries) = _global_queries(call), global_columns(call.queries)
    if in_one or facts.on_cuda(call) is None:
        return fused_rows(call, q, queries)
    tiles = _everyone_tiles(call, queries)
    asked = queries.valid[:, None, :, None]
    return run_tiles(q, call.k, call.v, tiles, scale=call.scale, learned=call.learned, asked=asked, sink=call.sink)


def dense_global_rows(call: PatternCall) -> Tensor:
    """The same by the definition, materialised."""
    q, (_, queries) = _global_queries(call), global_columns(call.queries)
    return dense(q, call.k, call.v, everyone_bias(call, queries, call.keys), scale=call.scale, sink=call.sink)


def fused_rows(call: PatternCall, q: Tensor, queries: Layout) -> Tensor:
    """Rows that see everything, for GPUs: by torch's fused attention, or by products where that would round what is
    added to the scores, or knows no sink. Masks are rows x S."""
    by_fused = call.sink is None and facts.exact_position_bias(call) is None
    scores, rows = len(q) * q.shape[1] * call.k.shape[2], q.shape[2]
    most = FUSED_ROWS if by_fused else max(1, min(FUSED_ROWS, scores_at_once(q) // scores))
    if rows <= most:
        return _rows_at_once(call, q, queries, slice(0, rows), by_fused)
    runs = [slice(start, min(start + most, rows)) for start in range(0, rows, most)]
    return torch.cat([_rows_at_once(call, q[:, :, some], queries.columns(some), some, by_fused) for some in runs], 2)


def _rows_at_once(call: PatternCall, q: Tensor, queries: Layout, some: slice, by_fused: bool) -> Tensor:
    """These of the rows."""
    key = ("fused rows", id(call.queries), call.pattern.causal, q.dtype, some.start, some.stop)
    # the plan keeps what the key's id is of
    bias, _ = call.keys.plan(key, lambda: (_seen_by_rows(call, queries), call.queries))
    if call.has_position_bias:
        more = call.pattern.position_bias(queries, call.keys)
        assert more is not None
        bias = bias + more
    if by_fused:
        return fused(q, call.k, call.v, bias, scale=call.scale)
    return attend_rows(q, call.k, call.v, bias, scale=call.scale, sink=call.sink)


def _seen_by_rows(call: PatternCall, queries: Layout) -> Tensor:
    """What is added to the scores of rows; a filler sees everything: it is thrown away, must only be finite."""
    seen = call.seen(queries, call.keys) | ~queries.valid[:, None, :, None]
    return torch.zeros((), dtype=call.q.dtype, device=call.q.device).where(seen, -torch.inf)


def put_global_rows(call: PatternCall, out: Tensor, rows: Tensor) -> Tensor:
    """Global rows put over what the pattern alone gave them."""
    found: Tensor = _Put.apply(out, rows, *_global_places(call.queries))
    return found


class _Put(torch.autograd.Function):
    """Some rows in the place of others, in one copy each way; fillers nowhere."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, rows: Tensor, columns: Tensor, valid: Tensor | None, filler: Tensor | None
    ) -> Tensor:
        index = columns.expand_as(rows)
        ctx.save_for_backward(index, valid, filler)
        return out.clone().scatter_(2, index, rows if valid is None else rows.where(valid, out.gather(2, index)))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        index, valid, filler = saved
        rows = grad.gather(2, index)
        if valid is None:
            return grad.clone().scatter_(2, index, 0.0), rows, None, None, None
        dout = grad.clone().scatter_(2, index, rows.masked_fill(valid, 0))
        return dout, rows.masked_fill(filler, 0), None, None, None
