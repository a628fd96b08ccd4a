"""Pieces of queries and keys that live in different places: which matter, which need no bias, which never meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from attention_zoo.layout.host import Array, Host
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.softmax.pieces import Piece
from attention_zoo.ops.softmax.tiles import scores_at_once

ROWS = {"cpu": 128}
"""Queries of a piece."""
_ROWS_GPU = 1024
_NEVER = np.iinfo(np.int64).max
Bias = Callable[[slice, slice], Tensor]
"""Of some rows and columns."""


class _Ends(NamedTuple):
    """Of runs of columns, [B, runs]: lowest and highest position and document; whether all are valid and of one."""

    low: Array
    high: Array
    first: Array
    last: Array
    whole: Array


def pieces_of(
    q: Tensor, queries: Layout, keys: Layout, bias: Bias, *, causal: bool, uniform: bool
) -> list[tuple[slice, list[Piece]]]:
    """What queries may see of keys, cut so that no step holds more scores than it should.

    Args:
        bias: the definition.
        causal: whether keys behind a query are hidden.
        uniform: whether the definition is 0 wherever a key is seen.
    """
    size = ROWS.get(q.device.type, _ROWS_GPU)
    B, H = q.shape[:2]
    wide = max(64, scores_at_once(q) // max(1, B * H * size))
    found = keys.plan(
        ("pieces", id(queries), causal, size, wide), lambda: (_found(queries, keys, causal, size, wide), queries)
    )[0]
    made = []
    for rows, columns in found:
        some = [Piece(rows, at, None if whole and uniform else partial(bias, rows, at)) for at, whole in columns]
        made.append((rows, some))
    return made


def _found(
    queries: Layout, keys: Layout, causal: bool, size: int, wide: int
) -> list[tuple[slice, list[tuple[slice, bool]]]]:
    """For each run of rows the runs of columns that it may see, and whether all of them are seen by all."""
    L, S = queries.valid.shape[1], keys.valid.shape[1]
    mine, theirs = _ends(queries.host, size), _ends(keys.host, wide)
    made = []
    for number, start in enumerate(range(0, L, size)):
        asked = _Ends(*(x[:, number, None] for x in mine))
        may = (asked.first <= theirs.last) & (theirs.first <= asked.last)
        one = (asked.first == asked.last) & (theirs.first == theirs.last)
        sure = asked.whole & theirs.whole & (asked.first == theirs.first)
        if causal:
            may &= ~one | (theirs.low <= asked.high)
            sure &= theirs.high <= asked.low
        some = [
            (slice(a * wide, min((a + 1) * wide, S)), bool(sure[:, a].all()))
            for a in np.flatnonzero(may.any(0)).tolist()
        ]
        made.append((slice(start, min(start + size, L)), some))
    return made


def _ends(host: Host, size: int) -> _Ends:
    def fold(x: Array, empty: int, low: bool) -> Array:
        x = np.where(host.valid, x, empty)
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=empty).reshape(len(x), -1, size)
        return x.min(-1) if low else x.max(-1)

    first, last = fold(host.document, _NEVER, True), fold(host.document, -1, False)
    padded = np.pad(host.valid, ((0, 0), (0, -host.valid.shape[1] % size)), constant_values=True)
    whole = padded.reshape(len(padded), -1, size).all(-1) & (first == last)
    return _Ends(fold(host.position, _NEVER, True), fold(host.position, -1, False), first, last, whole)
