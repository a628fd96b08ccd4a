"""One softmax over several sets of keys, each with a layout of its own: tokens and their summaries, levels, memories.

Each set is a part: its scores are computed by themselves and merged by log-sum-exp, forward and backward, so that
nothing is ever L x S. O(L · keys that are seen) time, O(L·D) memory. Without gradients the sets stay where they are, so
that a step of decoding reads what a state holds and copies none of it, with all scores in one softmax; with gradients
they are put together first. On CUDA FlexAttention runs what it can (several_flex.py), so that the host is not asked for
each tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Anywhere, Band
from attention_zoo.layout.visible import Seen, columns_of, visible
from attention_zoo.ops.pattern import several_flex
from attention_zoo.ops.pattern.globals import cuts
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.softmax.partial import Scratch, Sums, fold
from attention_zoo.ops.softmax.parts import Bias, Part
from attention_zoo.ops.softmax.tiles import Tile, run_tiles, scores_at_once

ROWS = 128
"""Queries of a tile."""
ALL_SEE = 256
"""Columns that are worth a part of their own, without a mask, where all queries of a tile see them."""


def attend_to_several(
    q: Float[Tensor, "B H L D"], queries: Layout, sets: Sequence[Keys], *, scale: float, causal: bool
) -> Float[Tensor, "B H L D"]:
    """What each query sees of all sets together; zeros where that is nothing, and at padding.

    Raises:
        ValueError: for a reach with gaps, or one that is no band.
    """
    if not sets:
        raise ValueError("sets must hold at least one set of keys, got none")
    for each in sets:
        _check(each)
    seen: list[Sequence[Seen | None]] = [_seen(each, queries, causal) for each in sets]
    if several_flex.refuse(q, sets) is None:
        return several_flex.run(q, queries, sets, seen, scale)
    tensors = [q, *(x for each in sets for x in (each.k, each.v, each.weight) if x is not None)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if q.shape[2] == 1 and not learns:
        return _of_one(q, queries, list(_pieces(q, queries, sets, seen, slice(0, 1))), scale)
    tiles = []
    for a in range(0, q.shape[2], ROWS):
        rows = slice(a, min(a + ROWS, q.shape[2]))
        tiles.append((rows, list(_pieces(q, queries, sets, seen, rows))))
    return (_together if learns else _apart)(q, queries, sets, tiles, scale)


class _Piece(NamedTuple):
    """Columns of one set, and what is added to their scores."""

    keys: Keys
    columns: slice
    bias: Bias


_Tiles = list[tuple[slice, list[_Piece]]]
"""Rows of queries, and what they see."""


def _pieces(
    q: Tensor, queries: Layout, sets: Sequence[Keys], seen: Sequence[Sequence[Seen | None]], rows: slice
) -> Iterator[_Piece]:
    most = max(64, scores_at_once(q) // (q.shape[1] * (rows.stop - rows.start)))
    for each, many in zip(sets, seen):
        for ranges in many:
            for low, high, all_see in _ranges(each, queries, ranges, rows):
                for first, stop in cuts(low, high, most) if high > low else ():
                    columns = slice(first, stop)
                    bias = _weights(each, columns) if all_see else _Bias(each, ranges, rows, columns, q.dtype)
                    yield _Piece(each, columns, bias)


def _together(q: Tensor, queries: Layout, sets: Sequence[Keys], tiles: _Tiles, scale: float) -> Tensor:
    """With gradients: all sets as one."""
    k, v = torch.cat([each.k for each in sets], 2), torch.cat([each.v for each in sets], 2)
    starts, at = {}, 0
    for each in sets:
        starts[id(each)], at = at, at + each.k.shape[2]

    def part(piece: _Piece) -> Part:
        start, columns = starts[id(piece.keys)], piece.columns
        return Part(slice(start + columns.start, start + columns.stop), piece.bias)

    learned = [each.weight for each in sets if each.weight is not None and each.weight.requires_grad]
    run = [Tile(rows, [part(piece) for piece in pieces]) for rows, pieces in tiles]
    if len(q) > 1:
        q = q.contiguous()  # so that rows of the batch can be computed together
    return run_tiles(q, k, v, run, scale=scale, learned=learned, asked=queries.asked)


def _apart(q: Tensor, queries: Layout, sets: Sequence[Keys], tiles: _Tiles, scale: float) -> Tensor:
    """Without gradients: every set where it is."""
    B, H, L, D = q.shape
    out, scratch = q.new_empty(B, L, H, D).transpose(1, 2), Scratch()
    with torch.autocast(q.device.type, enabled=False):
        for rows, pieces in tiles:
            widest = max((piece.columns.stop - piece.columns.start for piece in pieces), default=1)
            size = max(1, scores_at_once(q) // (H * (rows.stop - rows.start) * widest))
            for start in range(0, B, size):
                batch = slice(start, start + size)
                query = q[batch, :, rows]
                sums = Sums(query, scratch)
                for keys, columns, bias in pieces:
                    k, v = (x[batch, :, columns].flatten(0, 1) for x in (keys.k, keys.v))
                    shape = (len(query), H, query.shape[2])
                    sums.add(fold(query, keys.k.shape[1]), k, v, bias(batch), scale=scale, shape=shape)
                sums.end(out[batch, :, rows])
    return out if queries.asked is None else out.masked_fill_(~queries.asked, 0)


def _of_one(q: Tensor, queries: Layout, pieces: list[_Piece], scale: float) -> Tensor:
    """One query a row, as in decoding: the scores of all pieces in one softmax. They are D times smaller than keys."""
    B, H, _, D = q.shape
    if not pieces:
        return torch.zeros_like(q)
    exact = torch.promote_types(q.dtype, torch.float32)
    scores, values, biased = [], [], False
    with torch.autocast(q.device.type, enabled=False):
        rows = fold(q.to(exact) * scale, pieces[0].keys.k.shape[1])
        for keys, columns, bias in pieces:
            k, v = (x[:, :, columns].flatten(0, 1).to(exact) for x in (keys.k, keys.v))
            found = torch.bmm(rows, k.transpose(1, 2)).view(B, H, 1, -1)
            if (added := bias(slice(0, B))) is not None:
                found, biased = found + added, True
            scores.append(found)
            values.append(v)
        whole = torch.cat(scores, -1)
        weights = whole.softmax(-1)
        if biased:  # a query that sees nothing is told zeros
            weights = weights.masked_fill(whole.amax(-1, keepdim=True) == -torch.inf, 0)
        parts = weights.view(*rows.shape[:2], -1).split([each.shape[-1] for each in scores], -1)
        out = torch.bmm(parts[0], values[0])
        for part, value in zip(parts[1:], values[1:]):
            out = out.baddbmm_(part, value)
    out = out.view(B, H, 1, D).to(q.dtype)
    return out if queries.asked is None else out.masked_fill_(~queries.asked, 0)


def _check(keys: Keys) -> None:
    reach = keys.reach
    counts = (reach.back, reach.ahead) if isinstance(reach, Band) and reach.contiguous else (None,)
    if not isinstance(reach, Anywhere) and (counts == (None,) or any(isinstance(count, tuple) for count in counts)):
        raise ValueError(f"reach must be Anywhere or a Band without gaps, the same for all heads, got {reach}")
    shape = (keys.k.shape[0], keys.k.shape[2])
    if keys.weight is not None and keys.weight.shape != shape:
        raise ValueError(f"weight must be of shape {tuple(shape)} like the keys, got {tuple(keys.weight.shape)}")


def _seen(keys: Keys, queries: Layout, causal: bool) -> Sequence[Seen | None]:
    """Ranges of columns for each query; None: all of them, for all."""
    if keys.seen is not None or keys.layout is None:
        return keys.seen or (None,)
    return visible(queries, keys.layout, reach=keys.reach, causal=causal)


def _ranges(keys: Keys, queries: Layout, seen: Seen | None, rows: slice) -> list[tuple[int, int, bool]]:
    """Columns that some of these queries see, in up to three ranges, and whether all of them see all of a range."""
    if seen is None:
        return [(0, keys.k.shape[2], True)]
    low, high = columns_of(seen, rows).tolist()
    first, stop = int(seen.first[:, rows].max(initial=0)), int(seen.stop[:, rows].min(initial=high))
    if stop - first < ALL_SEE or not seen.keys.dense or not queries.dense:
        return [(low, high, False)]
    return [(low, first, False), (first, stop, True), (stop, high, False)]


def _weights(keys: Keys, columns: slice) -> Bias:
    """Of some columns that all queries of a tile see."""

    def bias(batch: slice) -> Tensor | None:
        if keys.weight is None:
            return None
        return keys.weight[batch, None, None, columns].to(torch.promote_types(keys.k.dtype, torch.float32))

    return bias


class _Bias:
    """Of some rows and columns of one set."""

    def __init__(self, keys: Keys, seen: Seen | None, rows: slice, columns: slice, dtype: torch.dtype):
        assert keys.layout is not None and seen is not None  # noqa: PT018
        self.keys, self.columns, self.valid = keys, columns, keys.layout.valid
        self.first, self.stop = seen.first[:, rows], seen.stop[:, rows]
        self.dtype = torch.promote_types(dtype, torch.float32)

    def __call__(self, batch: slice) -> Tensor:
        device, columns = self.keys.k.device, self.columns
        column = torch.arange(columns.start, columns.stop, device=device)
        first, stop = (tensor_of(x[batch], device)[..., None] for x in (self.first, self.stop))
        shown = (column >= first) & (column < stop) & self.valid[batch, None, columns]
        weight = self.keys.weight
        zero = torch.zeros((), dtype=self.dtype, device=device) if weight is None else weight[batch, None, columns]
        return torch.where(shown, zero.to(self.dtype), -torch.inf)[:, None]
