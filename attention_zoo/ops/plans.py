"""Which tiles a pattern needs: from position ranges in general, or by plain arithmetic where columns are aligned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.ops.fused import fused
from attention_zoo.ops.mild import mild_rows
from attention_zoo.ops.parts import Part
from attention_zoo.ops.pattern_call import PatternCall
from attention_zoo.ops.tiles import Rows, Tile, run_tiles, scores_at_once

FUSED_ROWS = 1024
"""Global queries in one fused call: bounds its mask."""
ALL = slice(None)


def run_local(call: PatternCall, local: list[Tile], asked: Tensor | None, first: int | None = None) -> Tensor:
    """Run the local tiles of a pattern, with global keys merged in, and global rows in place of what it gave them.

    Args:
        asked: which rows are queries, as `PatternCall.asked`.
        first: see `mild_rows`.
    """
    if first is None and call.own_keys:
        first = call.k.shape[2] - call.q.shape[2]
    mild = mild_rows(call, first)
    if call.any_global_key:
        keys = _GlobalKeys(call)
        near = _same_documents(
            call, call.queries, [tile.rows for tile in local if isinstance(tile.rows, slice)], keys.chosen
        )
        local = [tile._replace(parts=[*tile.parts, *keys.parts(_span(tile), some)]) for tile, some in zip(local, near)]
    if call.any_global_query and call.global_qkv is None:
        columns, queries = gather_columns(call.queries, call.queries.is_global & call.queries.valid)
        tiles = _everyone_tiles(call, queries)
        decided = [Tile(Rows(columns[:, _span(tile)], queries.valid[:, _span(tile)]), tile.parts) for tile in tiles]
        local = [*local, *decided]
    out = run_tiles(call.q, call.k, call.v, local, scale=call.scale, learned=call.learned, mild=mild, asked=asked)
    return with_global_rows(call, out) if call.global_qkv is not None else out


def _span(tile: Tile) -> slice:
    assert isinstance(tile.rows, slice)
    return tile.rows


def most_keys(call: PatternCall, rows: int) -> int:
    """Most keys of a part for so many rows, so that no step holds more scores than it should."""
    return max(64, scores_at_once(call.q) // (call.q.shape[1] * max(1, rows)))


def _cuts(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """The range in as few pieces of at most `most` as there can be, all of about the same size."""
    count = -(-(stop - start) // most)
    borders = [start + (stop - start) * piece // count for piece in range(count)] + [stop]
    return list(pairwise(borders))


def near_tiles(call: PatternCall) -> list[Tile]:
    """Tiles by the pattern's own `near`: any positions, holes, caches and documents."""
    size = 2 * call.pattern.tile
    q_range, k_range = _ranges(call.queries, size), _ranges(call.keys, size)
    count, most = q_range.lo.shape[1], most_keys(call, size)
    tiles = []
    for start in range(0, count, 64):  # some rows of the tile matrix at a time: it must not be quadratic itself
        need = _need(call, q_range.some(start, start + 64), k_range)
        for i, row in enumerate(need.cpu().unbind(0), start):
            rows = slice(i * size, min((i + 1) * size, call.q.shape[2]))
            found = torch.nonzero(row).flatten().tolist()
            tiles.append(Tile(rows, [_near_part(call, rows, run) for run in _runs(found, size, call.k.shape[2], most)]))
    return tiles


def band_tiles(call: PatternCall) -> list[Tile]:
    """Tiles of an aligned, shift-invariant pattern: evenly spaced keys, and one bias for all tiles of a stride."""
    H, strides = call.q.shape[1], call.pattern.strides
    assert call.pattern.reach is not None
    borders = [h for h in range(1, len(strides)) if strides[h] != strides[h - 1]]
    if any(border % (H // call.k.shape[1]) for border in borders):
        strides, borders = (1,), []  # one key head, several strides: all keys in reach, most of them masked
    heads = [slice(a, b) for a, b in pairwise([0, *borders, H])] if borders else [slice(None)]
    reach = call.pattern.reach // max(strides)
    return [tile for some in heads for tile in _stride_tiles(call, some, strides[some.start or 0], reach)]


def _stride_tiles(call: PatternCall, heads: slice, stride: int, reach: int) -> list[Tile]:
    """Tiles of heads that see every `stride`-th column: those of a residue class see each other as a band without gaps.

    Beltagy et al. 2020, §3.1 (dilated window).
    """
    L, S, size = call.q.shape[2], call.k.shape[2], call.pattern.tile
    reach = min(reach, S // stride)
    if reach + size >= S // stride:
        size *= 2  # a tile sees about all keys, whatever its size: fewer are faster
    bias = _BandBias(call, size, reach, stride)
    tiles = []
    for key in range(min(stride, S)):  # first column of the class
        row = (key - (S - L)) % stride  # and its first query
        before = (row + S - L - key) // stride  # keys of the class before the first query
        rows, keys = len(range(row, L, stride)), len(range(key, S, stride))
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            low, high = max(0, start + before - reach), stop + before + (0 if call.pattern.causal else reach)
            some = slice(row + start * stride, row + (stop - 1) * stride + 1, stride)
            parts = []
            for a, b in _cuts(low, min(keys, high), most_keys(call, size)):
                columns = slice(key + a * stride, key + (b - 1) * stride + 1, stride)
                parts.append(Part(columns, partial(bias, some, columns)))
            tiles.append(Tile(some, parts, heads))
    return tiles


class _BandBias:
    """The bias of every tile: what one tile would have that reaches beyond both ends, cut to the keys there are."""

    def __init__(self, call: PatternCall, size: int, reach: int, stride: int):
        self.call, self.size, self.reach, self.stride = call, size, reach, stride
        self.plain = call.all_valid and call.one_document and not call.any_global_key
        self.offset = call.k.shape[2] - call.q.shape[2]
        self.held: Tensor | None = None

    def __call__(self, rows: slice, columns: slice, batch: slice) -> Tensor:
        call = self.call
        before = (columns.start - (rows.start + self.offset)) // self.stride + self.reach
        height, width = (len(range(x.start, x.stop, self.stride)) for x in (rows, columns))
        whole = self._whole() if self.held is None or call.learned else self.held
        bias = whole[:, :, :height, before : before + width]
        if self.plain:
            return bias
        queries, keys = call.queries.cut(rows, batch), call.keys.cut(columns, batch)
        seen = keys.valid if not call.any_global_key else keys.valid & ~keys.is_global
        seen = seen[:, None, None, :]
        if not call.one_document:
            seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])[:, None]
        return bias.masked_fill(~seen, -torch.inf)

    def _whole(self) -> Tensor:
        """Of queries at `reach`, `reach` + 1, ... and all the keys that one of them sees, from position 0 on."""
        call, device = self.call, self.call.q.device
        keys = Tokens.all_valid(1, self.size + self.reach * (1 if call.pattern.causal else 2), device)
        keys = keys._replace(position=keys.position * self.stride)
        queries = keys.cut(slice(self.reach, self.reach + self.size))
        self.held = call.pattern.scores_bias(queries, keys)
        if call.pattern.causal:
            future = keys.position[:, None, :] > queries.position[:, :, None]
            self.held = self.held.masked_fill(future[:, None], -torch.inf)
        return self.held


# --- global tokens ---------------------------------------------------------------------------------------------------


def gather_columns(tokens: Tokens, mask: Tensor) -> tuple[Tensor, Tokens]:
    """Masked columns of each row, [B, n] in order, fillers marked invalid at the end."""
    order = torch.argsort((~mask).long(), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    chosen = tokens.take(order)
    return order, chosen._replace(valid=chosen.valid & mask.gather(1, order))


class _GlobalKeys:
    """The global keys of a call, to be parts of its tiles."""

    def __init__(self, call: PatternCall):
        self.call = call
        self.columns, self.chosen = gather_columns(call.keys, call.keys.is_global & call.keys.valid)
        self.width, self.all_seen = most_keys(call, call.pattern.tile), _all_seen(call, self.chosen)
        self.pieces: dict[tuple[int, int], Tensor] = {}  # the same tensor for all tiles: it is then gathered once

    def parts(self, rows: slice, some: slice) -> list[Part]:
        """What queries at these rows see of some of the keys."""
        return [self._part(rows, a, b) for a, b in _cuts(some.start, some.stop, self.width)]

    def _part(self, rows: slice, a: int, b: int) -> Part:
        columns = self.pieces.setdefault((a, b), self.columns[:, a:b])
        if self.all_seen:
            return Part(columns, no_bias)
        call, keys = self.call, self.chosen.cut(slice(a, b))
        return Part(columns, lambda batch: _global_bias(call, call.queries.cut(rows, batch), keys.cut(ALL, batch)))


def _same_documents(call: PatternCall, queries: Tokens, rows: list[slice], keys: Tokens) -> list[slice]:
    """For each run of query rows, the key columns among which all keys of their documents are.

    Without it a row of many documents, each with global tokens, would cost the square of its length.
    """
    if call.one_document:
        return [slice(0, keys.valid.shape[1])] * len(rows)
    low = torch.where(queries.valid, queries.document, torch.iinfo(torch.long).max)
    high = torch.where(queries.valid, queries.document, -1)
    lows = torch.stack([low[:, run].amin(1) for run in rows], 1)
    highs = torch.stack([high[:, run].amax(1) for run in rows], 1)
    ordered = torch.where(keys.valid, keys.document, -1).cummax(1).values  # documents never fall along a row
    start = torch.searchsorted(ordered, lows).amin(0)
    stop = torch.searchsorted(ordered, highs, right=True).amax(0)
    return [slice(a, b) for a, b in zip(start.tolist(), stop.tolist())]


def no_bias(batch: slice) -> None:
    """Of a part whose keys are all seen: None."""


def _all_seen(call: PatternCall, keys: Tokens) -> bool:
    """Whether `everyone_bias` is zero at these keys."""
    shown = not call.pattern.causal and call.one_document and not call.has_position_bias
    return shown and bool(keys.valid.all())


def _global_bias(call: PatternCall, queries: Tokens, keys: Tokens) -> Tensor | None:
    """`everyone_bias`, or None where it would be all zeros."""
    return None if _all_seen(call, keys) else everyone_bias(call, queries, keys)


def everyone_bias(call: PatternCall, queries: Tokens, keys: Tokens) -> Tensor:
    """Between a global token and anyone: the position bias, padding, document and causality, but no pattern."""
    extra = call.pattern.position_bias(queries, keys)
    zero = call.q.new_zeros((), dtype=torch.promote_types(call.q.dtype, torch.float32)) if extra is None else extra
    return torch.where(call.seen(queries, keys), zero, -torch.inf)


def _everyone_tiles(call: PatternCall, queries: Tokens) -> list[Tile]:
    """Tiles of queries that see everything; their rows count the given queries."""
    count, size, all_seen = queries.valid.shape[1], 2 * call.pattern.tile, _all_seen(call, call.keys)

    def part(rows: slice, keys: slice) -> Part:
        if all_seen:
            return Part(keys, no_bias)
        return Part(keys, lambda batch: _global_bias(call, queries.cut(rows, batch), call.keys.cut(keys, batch)))

    runs = [slice(a, min(a + size, count)) for a in range(0, count, size)]
    return [
        Tile(rows, [part(rows, slice(a, b)) for a, b in _cuts(some.start, some.stop, most_keys(call, size))])
        for rows, some in zip(runs, _same_documents(call, queries, runs, call.keys))
    ]


def with_global_rows(call: PatternCall, out: Tensor) -> Tensor:
    """The result of a pattern's local part, with the rows of global queries put over it."""
    if not call.any_global_query:
        return out
    columns, queries = gather_columns(call.queries, call.queries.is_global & call.queries.valid)
    q, k, v = call.global_qkv or (call.q, call.k, call.v)
    q = q.gather(2, columns[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    if q.is_cuda and not call.has_position_bias:
        rows = fused_rows(call, q, k, v, queries)
    else:
        asked = queries.valid[:, None, :, None]
        tiles = _everyone_tiles(call, queries)
        rows = run_tiles(q, k, v, tiles, scale=call.scale, learned=call.learned, asked=asked)
    return put_global_rows(out, call.queries, (columns, rows, queries))


def fused_rows(call: PatternCall, q: Tensor, k: Tensor, v: Tensor, queries: Tokens) -> Tensor:
    """Rows that see everything by torch's fused attention, for GPUs; without a position bias. Masks are rows x S."""
    found = []
    for start in range(0, q.shape[2], FUSED_ROWS):
        some = slice(start, start + FUSED_ROWS)
        # a filler sees everything: it is thrown away, and must only be finite
        seen = call.seen(queries.cut(some), call.keys) | ~queries.valid[:, None, some, None]
        bias = torch.zeros((), dtype=q.dtype, device=q.device).where(seen, -torch.inf)
        found.append(fused(q[:, :, some], k, v, bias, scale=call.scale))
    return torch.cat(found, 2)


def put_global_rows(out: Tensor, queries: Tokens, rows: tuple[Tensor, Tensor, Tokens]) -> Tensor:
    """Global rows put over what the pattern alone gave them."""
    columns, values, chosen = rows
    index = columns[:, None, :, None].expand_as(values)
    fresh = torch.where(chosen.valid[:, None, :, None], values, out.gather(2, index))
    return out.scatter(2, index, fresh)


# --- which tiles can matter ------------------------------------------------------------------------------------------


class _Ranges:
    """Per tile of columns: lowest and highest position and document of its valid tokens, and their length; [B, n]."""

    def __init__(self, lo: Tensor, hi: Tensor, first: Tensor, last: Tensor, length: Tensor):
        self.lo, self.hi, self.first, self.last, self.length = lo, hi, first, last, length

    def some(self, a: int, b: int) -> _Ranges:
        return _Ranges(*(x[:, a:b] for x in (self.lo, self.hi, self.first, self.last, self.length)))


def _ranges(tokens: Tokens, size: int) -> _Ranges:
    huge = 1 << 40

    def fold(x: Tensor, empty: int, low: bool) -> Tensor:
        x = torch.where(tokens.valid, x, empty)
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % size), value=empty).unflatten(1, (-1, size))
        return x.amin(-1) if low else x.amax(-1)

    return _Ranges(
        fold(tokens.position, huge, True),
        fold(tokens.position, -huge, False),
        fold(tokens.document, huge, True),
        fold(tokens.document, -huge, False),
        fold(tokens.length, 0, False),
    )


def _need(call: PatternCall, q: _Ranges, k: _Ranges) -> Tensor:
    """Bool [query tiles, key tiles]: may any row of the batch need this tile?"""
    ql, qh, q1, q2 = (x[:, :, None] for x in (q.lo, q.hi, q.first, q.last))
    kl, kh, k1, k2 = (x[:, None, :] for x in (k.lo, k.hi, k.first, k.last))
    mixed = (q1 != q2) | (k1 != k2)  # `near` is only asked about tiles of one document
    need = call.pattern.near(ql, qh, kl, kh, k.length[:, None, :]) | mixed
    need = need & (q1 <= k2) & (k1 <= q2) & (qh >= 0) & (kh >= 0)
    if call.pattern.causal:
        need = need & (kl <= qh)
    return need.any(0)


def needed_pairs(call: PatternCall, size: int) -> tuple[Tensor, Tensor]:
    """Every tile of `size` rows and columns that may matter: its row and its column, row by row."""
    q_range, k_range = _ranges(call.queries, size), _ranges(call.keys, size)
    found = []
    for start in range(0, q_range.lo.shape[1], 64):  # the matrix of tiles is never there as a whole
        row, column = _need(call, q_range.some(start, start + 64), k_range).nonzero().unbind(1)
        found.append(torch.stack([row + start, column]))
    row, column = torch.cat(found, 1)
    return row, column


def _runs(tiles: list[int], size: int, columns: int, most: int) -> Iterator[slice | list[slice]]:
    """Key columns of the needed tiles: a run of neighbours stays one slice; scattered ones are gathered together."""
    runs: list[slice] = []
    for j in tiles:
        a, b = j * size, min((j + 1) * size, columns)
        if runs and runs[-1].stop == a and b - runs[-1].start <= most:
            runs[-1] = slice(runs[-1].start, b)
        else:
            runs.append(slice(a, b))
    scattered: list[slice] = []
    for run in runs:
        if run.stop - run.start >= min(4 * size, most):
            yield run
            continue
        if scattered and sum(s.stop - s.start for s in scattered) + run.stop - run.start > most:
            yield scattered
            scattered = []
        scattered.append(run)
    if scattered:
        yield scattered[0] if len(scattered) == 1 else scattered


def _near_part(call: PatternCall, rows: slice, run: slice | list[slice]) -> Part:
    if isinstance(run, slice):
        return Part(run, lambda batch: call.local_bias(call.queries.cut(rows, batch), call.keys.cut(run, batch)))
    columns = torch.cat([torch.arange(s.start, s.stop, device=call.k.device) for s in run])
    return Part(columns, lambda batch: call.local_bias(call.queries.cut(rows, batch), call.keys.cut(columns, batch)))
