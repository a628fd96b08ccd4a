"""Attention to one of many sets of keys: each query sees the whole of the set that its number names, and no other.

A recurrent state attended to over time is such: a set a block. Queries that follow one another mostly share a set:
stretches of at most a block are rows of one fused call, without any mask, wherever documents begin and holes are. Only
where most stretches are much shorter than a block, longer ones are tiles, and short ones are put together, and masked.
O(L · S) time for sets of S keys, O(L·D) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.ops.pattern.globals import cuts, no_bias
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile, run_tiles, scores_at_once

SHORT = 32
"""Queries of one set that are worth a tile of their own."""
FILLED = 2
"""Times as many rows as there are queries that stretches may be filled up to."""
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
    numbers = which.reshape(-1)
    starts, counts = _stretches(numbers, block)
    longest = int(counts.max(initial=1))
    if len(starts) * longest <= FILLED * B * L:
        return _by_stretches(q, k, v, numbers[starts], starts, counts, longest, scale, asked)
    flat = q.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]  # a view of what a projection writes
    k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (k, v))
    most = max(SHORT, scores_at_once(q) // (H * S))
    tiles = [_tile(numbers, rows, S, max(S, scores_at_once(q) // (H * most)), q) for rows in _rows(numbers, most)]
    hidden = None if asked is None else asked.reshape(1, 1, B * L, 1)
    out = run_tiles(flat, k, v, tiles, scale=scale, asked=hidden)
    return out[0].transpose(0, 1).unflatten(0, (B, L)).transpose(1, 2)


def _stretches(numbers: Int[np.ndarray, " n"], block: int) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Where queries of one set begin, at most a block of them, and how many they are."""
    borders = np.flatnonzero(np.append(True, np.diff(numbers) != 0))
    lengths = np.diff(np.append(borders, len(numbers)))
    parts = -(-lengths // block)
    part = np.arange(parts.sum()) - np.repeat(parts.cumsum() - parts, parts)
    return np.repeat(borders, parts) + part * block, np.minimum(np.repeat(lengths, parts) - part * block, block)


def _by_stretches(
    q: Tensor, k: Tensor, v: Tensor, sets: Array, starts: Array, counts: Array, longest: int, scale: float,
    asked: Tensor | None,
) -> Tensor:  # fmt: skip
    """Each stretch of queries is a row of one fused call, with the keys of its set."""
    B, H, L, D = q.shape
    if len(k) == 1:
        k, v = (x.expand(len(sets), -1, -1, -1) for x in (k, v))
    elif bool((np.diff(sets) == 1).all()):
        k, v = (x.narrow(0, int(sets[0]), len(sets)) for x in (k, v))
    else:
        k, v = (x.index_select(0, tensor_of(sets, q.device)) for x in (k, v))
    flat, alike = q.transpose(1, 2).reshape(B * L, H, D), bool((counts[:-1] == longest).all())
    if alike:
        rows = torch.nn.functional.pad(flat, (0, 0, 0, 0, 0, len(starts) * longest - B * L))
    else:
        # behind a short stretch stand others, whose results nobody takes
        several = (starts[:, None] + np.arange(longest)).clip(max=B * L - 1)
        rows = flat.index_select(0, tensor_of(several.reshape(-1), q.device))
    rows = rows.view(-1, longest, H, D).transpose(1, 2).to(k.dtype)
    out = fused(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale).transpose(1, 2).to(q.dtype)
    out = out.reshape(-1, H, D)
    if alike:
        out = out[: B * L]
    else:
        place = np.arange(B * L) + np.repeat(np.arange(len(starts)) * longest - starts, counts)
        out = out.index_select(0, tensor_of(place, q.device))
    out = out.view(B, L, H, D).transpose(1, 2)
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
