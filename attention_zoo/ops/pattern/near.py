"""Tiles of any pattern, wherever its tokens lie: by the ranges of positions in them, and what the pattern reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from attention_zoo.layout.host import Array, Host
from attention_zoo.layout.reach import Tiles
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import most_keys
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile

AT_ONCE = 64
"""Rows of the matrix of tiles that are held at a time: it must not be quadratic itself."""
_HUGE = 1 << 40


def near_tiles(call: PatternCall) -> list[Tile]:
    """Tiles that may matter: any positions, holes, caches and documents."""
    size, (L, S) = 2 * call.pattern.tile, call.lengths
    most = most_keys(call, size)
    tiles = []
    for i, found in enumerate(_needed(call, size)):
        rows = slice(i * size, min((i + 1) * size, L))
        tiles.append(Tile(rows, [_part(call, rows, run) for run in _runs(found, size, S, most)]))
    return tiles


def needed_pairs(call: PatternCall, size: int) -> tuple[Array, Array]:
    """Every tile of `size` rows and columns that may matter: its row and its column, row by row."""
    needed = _needed(call, size)
    row = np.repeat(np.arange(len(needed)), [len(found) for found in needed])
    return row, np.concatenate([*needed, []]).astype(np.int64)


def _needed(call: PatternCall, size: int) -> list[Any]:
    """For each tile of queries the tiles of keys that may matter, for any row of the batch."""
    reach, causal = call.pattern.reach, call.pattern.causal
    key = ("needed", id(call.queries), reach, causal, size)
    # the plan keeps what the key's id is of, and reaches that say how they compare are compared
    return call.keys.plan(key, lambda: (_find(call, size), call.queries, reach))[0]


def _find(call: PatternCall, size: int) -> list[Any]:
    queries, keys = _ranges(call.queries.host, size), _ranges(call.keys.host, size)
    found: list[Any] = []
    for start in range(0, queries.lo.shape[1], AT_ONCE):
        need = _need(call, queries.some(start, start + AT_ONCE), keys, size)
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


def _need(call: PatternCall, q: _Ranges, k: _Ranges, size: int) -> Bool[np.ndarray, "q k"]:
    """May any row of the batch need this tile?"""
    ql, qh, q1, q2 = (x[:, :, None] for x in q[:4])
    kl, kh, k1, k2 = (x[:, None, :] for x in k[:4])
    mixed = (q1 != q2) | (k1 != k2)  # a reach is only asked about tiles of one document
    need = call.pattern.reach.near(Tiles(ql, qh, kl, kh, k.length[:, None, :], size)) | mixed
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


def _part(call: PatternCall, rows: slice, run: slice | list[slice]) -> Part:
    if isinstance(run, slice):
        return Part(run, lambda batch: call.local_bias(call.queries.cut(rows, batch), call.keys.cut(run, batch)))
    columns = torch.cat([torch.arange(s.start, s.stop, device=call.k.device) for s in run])
    return Part(columns, lambda batch: call.local_bias(call.queries.cut(rows, batch), call.keys.cut(columns, batch)))
