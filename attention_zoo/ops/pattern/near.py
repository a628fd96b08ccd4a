"""Tiles of any pattern, wherever its tokens lie: by the ranges of positions in them, and what the pattern reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attention_zoo.layout.host import Array, Host, on_host
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Reach, Tiles
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.facts import is_band
from attention_zoo.ops.pattern.globals import most_keys
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile

AT_ONCE = 64
"""Rows of the matrix of tiles that are held at a time: it must not be quadratic itself."""
_HUGE = 1 << 40
TileBias = Callable[[slice, slice | Tensor, slice], Tensor]
"""Of some rows and columns, for these batch rows."""


def near_tiles(call: PatternCall) -> tuple[list[Tile], Sequence[Tensor]]:
    """Tiles that may matter: any positions, holes, caches and documents; and what their biases learn by."""
    table = _Table(call) if call.learned and is_band(call.pattern) is None else None
    tiles = _tiles(call, call.pattern.reach, partial(_part, call, table))
    return tiles, call.learned if table is None else [table.whole]


def tiles_within(call: PatternCall, reach: Reach, bias: TileBias) -> list[Tile]:
    """Tiles of another reach than the pattern's own, whose bias is computed in another way."""
    return _tiles(call, reach, lambda rows, columns: Part(columns, partial(bias, rows, columns)))


def _tiles(call: PatternCall, reach: Reach, part: Callable[[slice, slice | Tensor], Part]) -> list[Tile]:
    size, (L, S) = 2 * call.pattern.tile, call.lengths
    most = most_keys(call, size)
    tiles = []
    for i, found in enumerate(_needed(call, size, reach)):
        rows = slice(i * size, min((i + 1) * size, L))
        tiles.append(Tile(rows, [part(rows, _columns(run, call.k)) for run in _runs(found, size, S, most)]))
    return tiles


def needed_pairs(call: PatternCall, size: int, reach: Reach | None = None) -> tuple[Array, Array]:
    """Every tile of `size` rows and columns that may matter: its row and its column, row by row.

    Args:
        reach: default the pattern's own.
    """
    needed = _needed(call, size, reach or call.pattern.reach)
    row = np.repeat(np.arange(len(needed)), [len(found) for found in needed])
    return row, np.concatenate([*needed, []]).astype(np.int64)


def _needed(call: PatternCall, size: int, reach: Reach) -> list[Any]:
    """For each tile of queries the tiles of keys that may matter, for any row of the batch."""
    causal = call.pattern.causal
    key = ("needed", id(call.queries), reach, causal, size)
    # the plan keeps what the key's id is of, and reaches that say how they compare are compared
    return call.keys.plan(key, lambda: (_find(call, size, reach), call.queries, reach))[0]


def _find(call: PatternCall, size: int, reach: Reach) -> list[Any]:
    queries, keys = _ranges(call.queries.host, size), _ranges(call.keys.host, size)
    found: list[Any] = []
    for start in range(0, queries.lo.shape[1], AT_ONCE):
        need = _need(call, queries.some(start, start + AT_ONCE), keys, size, reach)
        found.extend(row.nonzero()[0].tolist() for row in need)
    return found


class _Ranges(NamedTuple):
    """Per tile of columns: lowest and highest position and document of its valid tokens, and their length; [B, n]."""

    lo: Array
    hi: Array
    first: Array
    last: Array
    length: Array

    def some(self, a: int, b: int) -> _Ranges:
        return _Ranges(*(x[:, a:b] for x in self))


def _ranges(tokens: Host, size: int) -> _Ranges:
    def fold(x: Array, empty: int, low: bool) -> Array:
        x = np.where(tokens.valid, x, empty)
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=empty).reshape(len(x), -1, size)
        return x.min(-1) if low else x.max(-1)

    return _Ranges(
        fold(tokens.position, _HUGE, True),
        fold(tokens.position, -_HUGE, False),
        fold(tokens.document, _HUGE, True),
        fold(tokens.document, -_HUGE, False),
        fold(tokens.length, 0, False),
    )


def _need(call: PatternCall, q: _Ranges, k: _Ranges, size: int, reach: Reach) -> Bool[np.ndarray, "q k"]:
    """May any row of the batch need this tile?"""
    ql, qh, q1, q2 = (x[:, :, None] for x in q[:4])
    kl, kh, k1, k2 = (x[:, None, :] for x in k[:4])
    mixed = (q1 != q2) | (k1 != k2)  # a reach is only asked about tiles of one document
    need = reach.near(Tiles(ql, qh, kl, kh, k.length[:, None, :], size)) | mixed
    need = need & (q1 <= k2) & (k1 <= q2) & (qh >= 0) & (kh >= 0)
    if call.pattern.causal:
        need = need & (kl <= qh)
    return need.any(0)


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


def _columns(run: slice | list[slice], like: Tensor) -> slice | Tensor:
    if isinstance(run, slice):
        return run
    return torch.cat([torch.arange(s.start, s.stop, device=like.device) for s in run])


def _part(call: PatternCall, table: _Table | None, rows: slice, columns: slice | Tensor) -> Part:
    if table is not None:
        return Part(columns, partial(table.bias, rows, columns), learn=partial(table.learned, rows, columns))
    return Part(columns, lambda batch: call.local_bias(call.queries.cut(rows, batch), call.keys.cut(columns, batch)))


class _Table:
    """A learned bias that depends on the distance alone: computed once for each distance, and so is its gradient."""

    def __init__(self, call: PatternCall):
        self.call, farthest = call, call.band.farthest
        self.ahead = 0 if call.pattern.causal else farthest
        # as seen from position `farthest`, the farthest key ahead first
        query = Layout.plain(1, 1, call.k.device, start=farthest)
        keys = Layout.plain(1, farthest + 1 + self.ahead, call.k.device)
        bias = call.pattern.scores_bias(query, keys)[0, :, 0].flip(-1)
        self.whole = bias.expand(call.q.shape[1], -1)
        # beyond reach, on either side
        self.held = nn.functional.pad(self.whole.detach(), (1, 1), value=-torch.inf)

    def bias(self, rows: slice, columns: slice | Tensor, batch: slice) -> Tensor:
        place = self._place(rows, columns, batch)
        return self.held.index_select(1, place.flatten()).unflatten(1, place.shape).transpose(0, 1)

    def learned(
        self, rows: slice, columns: slice | Tensor, sums: Sequence[Tensor], dscores: Tensor, batch: slice
    ) -> None:
        """As `Part.learn`. What is hidden has no weight, hence no gradient."""
        place = self._place(rows, columns, batch).sub_(1).clamp_(0, self.whole.shape[1] - 1)
        place, given = place.expand(len(dscores), -1, -1).flatten(), dscores.transpose(0, 1).flatten(1)
        given = given.to(sums[0].dtype)
        if on_host(place.device):
            sums[0].scatter_add_(1, place.expand(len(given), -1), given)
            return
        head = torch.arange(len(given), device=place.device)[:, None]
        # in a fixed order elsewhere, too, which adding by `scatter_add_` has not
        sums[0].index_put_((head, place), given, accumulate=True)

    def _place(self, rows: slice, columns: slice | Tensor, batch: slice) -> Int[Tensor, "b l s"]:
        """Where in the table a pair stands; at an end, what is not seen."""
        call = self.call
        queries, keys = call.queries.cut(rows, batch), call.keys.cut(columns, batch)
        there = keys.valid & ~keys.is_global if call.any_global_key else keys.valid
        place = (queries.position + (self.ahead + 1))[:, :, None] - keys.position[:, None]
        place.clamp_(0, self.held.shape[1] - 1)
        if not call.one_document:
            place *= queries.document[:, :, None] == keys.document[:, None]
        if not call.all_valid or call.any_global_key:
            place *= there[:, None]
        return place
