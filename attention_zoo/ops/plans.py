"""Which tiles a pattern needs: from position ranges in general, or by plain arithmetic where columns are aligned."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.ops.pattern_call import PatternCall
from attention_zoo.ops.tiles import Part, Tile, run_tiles

WIDEST = 4096
"""Most keys in one part: bounds the bias of a tile when a row sees everything."""


def run_local(call: PatternCall, local: list[Tile]) -> Tensor:
    """Run the local tiles of a pattern, with global keys merged in and global rows put over the result."""
    if call.any_global_key:
        columns, chosen = gather_columns(call.keys, call.keys.is_global & call.keys.valid)
        near = _same_documents(call, call.queries, [tile.rows for tile in local], chosen)
        local = [
            Tile(rows, [*parts, *_global_parts(call, rows, columns, chosen, some)])
            for (rows, parts), some in zip(local, near)
        ]
    out = run_tiles(call.q, call.k, call.v, local, scale=call.scale, learned=call.learned)
    if call.any_global_query:
        out = put_global_rows(out, call.queries, global_rows(call, *(call.global_qkv or (call.q, call.k, call.v))))
    return out


def near_tiles(call: PatternCall) -> list[Tile]:
    """Tiles by the pattern's own `near`: any positions, holes, caches and documents."""
    size = call.pattern.tile
    q_range, k_range = _ranges(call.queries, size), _ranges(call.keys, size)
    count = q_range.lo.shape[1]
    tiles = []
    for start in range(0, count, 64):  # some rows of the tile matrix at a time: it must not be quadratic itself
        need = _need(call, q_range.some(start, start + 64), k_range)
        for i, row in enumerate(need.cpu().unbind(0), start):
            rows = slice(i * size, min((i + 1) * size, call.q.shape[2]))
            found = torch.nonzero(row).flatten().tolist()
            tiles.append(Tile(rows, [_near_part(call, rows, run) for run in _runs(found, size, call.k.shape[2])]))
    return tiles


def band_tiles(call: PatternCall) -> list[Tile]:
    """Tiles of an aligned, shift-invariant pattern: contiguous keys, and one bias for all tiles of the same shape."""
    L, S, size, reach = call.q.shape[2], call.k.shape[2], call.pattern.tile, call.pattern.reach
    assert reach is not None
    memo: dict[tuple[int, int, int], Tensor] = {}
    plain = call.all_valid and call.one_document and not call.any_global_key
    tiles = []
    for start in range(0, L, size):
        rows = slice(start, min(start + size, L))
        first, last = start + S - L, rows.stop - 1 + S - L
        lo, hi = max(0, first - reach), min(S, last + 1 + (0 if call.pattern.causal else reach))
        parts = []
        for a in range(lo, hi, WIDEST):
            columns = slice(a, min(a + WIDEST, hi))
            parts.append(Part(columns, _band_bias(call, rows, columns, first - a, memo, plain)))
        tiles.append(Tile(rows, parts))
    return tiles


def _band_bias(call: PatternCall, rows: slice, columns: slice, offset: int, memo: dict, plain: bool):
    """Bias of a tile whose first query stands `offset` columns after its first key."""
    n, m = rows.stop - rows.start, columns.stop - columns.start

    def shape_bias() -> Tensor:
        key = (offset, n, m)
        if key in memo and not call.learned:
            return memo[key]
        device = call.q.device
        base = Tokens.all_valid(1, 1, device)
        shift = max(0, -offset)

        def at(first: int, count: int) -> Tokens:
            position = torch.arange(first, first + count, device=device)[None]
            other = [field.expand(1, count) for field in (base.valid, base.is_global, base.document, base.length)]
            return Tokens(position, *other)

        queries, keys = at(offset + shift, n), at(shift, m)
        bias = call.pattern.scores_bias(queries, keys)
        if call.pattern.causal:
            future = keys.position[:, None, :] > queries.position[:, :, None]
            bias = bias.masked_fill(future[:, None], -torch.inf)
        memo[key] = bias
        return bias

    if plain:
        return shape_bias

    def masked() -> Tensor:
        queries, keys = call.queries.cut(rows), call.keys.cut(columns)
        seen = keys.valid if not call.any_global_key else keys.valid & ~keys.is_global
        seen = seen[:, None, None, :]
        if not call.one_document:
            seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])[:, None]
        return shape_bias().masked_fill(~seen, -torch.inf)

    return masked


# --- global tokens ---------------------------------------------------------------------------------------------------


def gather_columns(tokens: Tokens, mask: Tensor) -> tuple[Tensor, Tokens]:
    """Masked columns of each row, [B, n] in order, fillers marked invalid at the end."""
    order = torch.argsort((~mask).long(), dim=1, stable=True)[:, : int(mask.sum(1).max())]
    chosen = tokens.take(order)
    return order, chosen._replace(valid=chosen.valid & mask.gather(1, order))


def _global_parts(call: PatternCall, rows: slice, columns: Tensor, chosen: Tokens, some: slice) -> list[Part]:
    def part(a: int, b: int) -> Part:
        keys = chosen.cut(slice(a, b))
        return Part(columns[:, a:b], lambda: everyone_bias(call, call.queries.cut(rows), keys))

    return [part(a, min(a + WIDEST, some.stop)) for a in range(some.start, some.stop, WIDEST)]


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


def everyone_bias(call: PatternCall, queries: Tokens, keys: Tokens) -> Tensor:
    """Between a global token and anyone: the position bias, padding, document and causality, but no pattern."""
    extra = call.pattern.position_bias(queries, keys)
    zero = call.q.new_zeros((), dtype=torch.promote_types(call.q.dtype, torch.float32)) if extra is None else extra
    return torch.where(call.seen(queries, keys), zero, -torch.inf)


def global_rows(call: PatternCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tokens]:
    """Outputs of global queries, which see everything: columns [B, n], out [B, H, n, D], their tokens."""
    columns, queries = gather_columns(call.queries, call.queries.is_global & call.queries.valid)
    index = columns[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    size = call.pattern.tile

    def part(rows: slice, keys: slice) -> Part:
        return Part(keys, lambda: everyone_bias(call, queries.cut(rows), call.keys.cut(keys)))

    runs = [slice(a, min(a + size, columns.shape[1])) for a in range(0, columns.shape[1], size)]
    tiles = []
    for rows, some in zip(runs, _same_documents(call, queries, runs, call.keys)):
        cuts = range(some.start, some.stop, WIDEST)
        tiles.append(Tile(rows, [part(rows, slice(a, min(a + WIDEST, some.stop))) for a in cuts]))
    return columns, run_tiles(q.gather(2, index), k, v, tiles, scale=call.scale, learned=call.learned), queries


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


def _runs(tiles: list[int], size: int, columns: int) -> Iterator[slice | list[slice]]:
    """Key columns of the needed tiles: a run of neighbours stays one slice; scattered ones are gathered together."""
    runs: list[slice] = []
    for j in tiles:
        a, b = j * size, min((j + 1) * size, columns)
        if runs and runs[-1].stop == a and b - runs[-1].start <= WIDEST:
            runs[-1] = slice(runs[-1].start, b)
        else:
            runs.append(slice(a, b))
    scattered: list[slice] = []
    for run in runs:
        if run.stop - run.start >= 4 * size:
            yield run
            continue
        if scattered and sum(s.stop - s.start for s in scattered) + run.stop - run.start > WIDEST:
            yield scattered
            scattered = []
        scattered.append(run)
    if scattered:
        yield scattered[0] if len(scattered) == 1 else scattered


def _near_part(call: PatternCall, rows: slice, run: slice | list[slice]) -> Part:
    if isinstance(run, slice):
        return Part(run, lambda: call.local_bias(call.queries.cut(rows), call.keys.cut(run)))
    columns = torch.cat([torch.arange(s.start, s.stop, device=call.k.device) for s in run])
    return Part(columns, lambda: call.local_bias(call.queries.cut(rows), call.keys.cut(columns)))
