"""Attention to one of many sets of keys: each query sees the whole of the set that its number names, and no other.

A recurrent state attended to over time is such: a set a block. Queries that follow one another mostly share a set, so a
tile is a stretch of one set's queries, without any mask; only short stretches are put together, and masked. Where all
stretches are alike, they are rows of one fused call instead, which is half as fast again (measured on a CPU). O(L · S)
time for sets of S keys, O(L·D) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.ops.pattern.globals import cuts, no_bias
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile, run_tiles, scores_at_once

SHORT = 32
"""Queries of one set that are worth a tile of their own."""
MIXED = 128
"""Most queries of several sets in a tile: each of them is multiplied by the keys of all."""


def attend_to_one_of(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "N S K D"],
    v: Float[Tensor, "N S K D"],
    which: Int[np.ndarray, "B L"],
    *,
    block: int,
    scale: float,
    asked: Bool[Tensor, "B 1 L 1"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """What each query sees of its set; zeros where it is no query.

    Args:
        which: the set of each query, from 0 to N - 1; any at padding.
        block: queries that mostly share a set, from some column on.
        asked: which rows are queries; None: all.
    """
    (B, H, L, _), S = q.shape, k.shape[1]
    if block < L:
        more = -L % block
        alike = np.pad(which, ((0, 0), (0, more)), mode="edge").reshape(-1, block)
        if bool((alike == alike[:, :1]).all()):
            return _blockwise(q, k, v, alike[:, 0], block, scale, asked)
    flat = q.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]  # a view of what a projection writes
    k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (k, v))
    most = max(SHORT, scores_at_once(q) // (H * S))
    numbers = which.reshape(-1)
    tiles = [_tile(numbers, rows, S, max(S, scores_at_once(q) // (H * most)), q) for rows in _rows(numbers, most)]
    hidden = None if asked is None else asked.reshape(1, 1, B * L, 1)
    out = run_tiles(flat, k, v, tiles, scale=scale, asked=hidden)
    return out[0].transpose(0, 1).unflatten(0, (B, L)).transpose(1, 2)


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, numbers: Int[np.ndarray, " n"], block: int, scale: float, asked: Tensor | None
) -> Tensor:
    """Each block of queries is a row of one fused call, with the keys of its set."""
    B, _, L, _ = q.shape
    more, first = -L % block, int(numbers[0])
    if bool((np.diff(numbers) == 1).all()):
        k, v = (x.narrow(0, first, len(numbers)) for x in (k, v))
    else:
        k, v = (x.index_select(0, tensor_of(numbers, q.device)) for x in (k, v))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = torch.nn.functional.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, more)).reshape(-1, block, *q.shape[1::2])
    out = fused(rows.transpose(1, 2).to(k.dtype), k, v, scale=scale).transpose(1, 2).to(q.dtype)
    out = out.reshape(B, L + more, *q.shape[1::2])[:, :L].transpose(1, 2)
    return out if asked is None else out.masked_fill(~asked, 0)


def _rows(numbers: Int[np.ndarray, " n"], most: int) -> Iterator[slice]:
    """At most so many rows at once: of one number where enough of them follow each other, else of any."""
    borders = np.flatnonzero(np.diff(numbers)) + 1
    start = 0
    for a, b in zip([0, *borders.tolist()], [*borders.tolist(), len(numbers)]):
        if b - a < SHORT and b - start <= min(most, MIXED):
            continue  # a few more for those that wait
        if start < a:
            yield slice(start, a)
        if b - a < SHORT:
            start = a
            continue
        yield from (slice(a + low, a + high) for low, high in cuts(0, b - a, most))
        start = b
    if start < len(numbers):
        yield slice(start, len(numbers))


def _tile(numbers: Int[np.ndarray, " n"], rows: slice, size: int, most: int, like: Tensor) -> Tile:
    """Those rows, and the sets that they see, as stretches of keys."""
    found = np.unique(numbers[rows])
    if len(found) == 1:
        return Tile(rows, [Part(slice(found[0] * size, (found[0] + 1) * size), no_bias)])
    stretches = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1)
    keys = [
        slice(each[0] * size + low, each[0] * size + high)
        for each in stretches
        for low, high in cuts(0, len(each) * size, most)
    ]
    return Tile(rows, [Part(each, partial(_bias, numbers[rows], each, size, like)) for each in keys])


def _bias(numbers: Int[np.ndarray, " n"], keys: slice, size: int, like: Tensor, batch: slice) -> Tensor:
    """0 between a query and its own set."""
    sets = np.arange(keys.start, keys.stop) // size
    seen = tensor_of(numbers[:, None] == sets, like.device)
    zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return torch.where(seen, zero, -torch.inf)[None, None]
