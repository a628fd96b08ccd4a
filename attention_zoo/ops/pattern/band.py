"""Tiles of a band: by plain arithmetic, where columns lie as positions do, and one mask for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import cuts, most_keys
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Tile


def band_tiles(call: PatternCall) -> tuple[list[Tile], list[Tensor]]:
    """Tiles of an aligned band: evenly spaced keys, and one bias for all tiles of a stride; the biases that learn."""
    H, strides = call.q.shape[1], call.band.strides
    borders = [h for h in range(1, len(strides)) if strides[h] != strides[h - 1]]
    if any(border % (H // call.k.shape[1]) for border in borders):
        strides, borders = (1,), []  # one key head, several strides: all keys in reach, most of them masked
    heads = [slice(a, b) for a, b in pairwise([0, *borders, H])] if borders else [slice(None)]
    reach = call.band.farthest // max(strides)
    tiles: list[Tile] = []
    learned: list[Tensor] = []
    for some in heads:
        tiles += _stride_tiles(call, some, strides[some.start or 0], reach, learned)
    return tiles, learned


def _stride_tiles(call: PatternCall, heads: slice, stride: int, reach: int, learned: list[Tensor]) -> list[Tile]:
    """Tiles of heads that see every `stride`-th column: those of a residue class see each other as a band without gaps.

    Beltagy et al. 2020, §3.1 (dilated window).
    """
    (L, S), size = call.lengths, call.pattern.tile
    reach = min(reach, S // stride)
    if reach + size >= S // stride:
        size *= 2  # a tile sees about all keys, whatever its size: fewer are faster
    bias = _BandBias(call, size, reach, stride)
    if call.learned:
        bias.learn(heads, learned)
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
            for a, b in cuts(low, min(keys, high), most_keys(call, size)):
                columns = slice(key + a * stride, key + (b - 1) * stride + 1, stride)
                learn = partial(bias.learned, some, columns) if call.learned else None
                parts.append(Part(columns, partial(bias, some, columns), learn=learn))
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
        if self.held is None:
            self.held = self._whole()
        bias = self._cut(self.held, rows, columns)
        if self.plain or self._shows_all(columns):
            return bias
        queries, keys = call.queries.cut(rows, batch), call.keys.cut(columns, batch)
        seen = keys.valid if not call.any_global_key else keys.valid & ~keys.is_global
        seen = seen[:, None, None, :]
        if not call.one_document:
            seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])[:, None]
        return bias.masked_fill(~seen, -torch.inf)

    def _shows_all(self, columns: slice) -> bool:
        """Whether there is neither padding nor a global token among these keys, nor another document."""
        if not self.call.one_document:
            return False
        keys = self.call.keys.host.cut(columns)
        return bool(keys.valid.all()) and not keys.is_global.any()

    def _cut(self, whole: Tensor, rows: slice, columns: slice) -> Tensor:
        before = (columns.start - (rows.start + self.offset)) // self.stride + self.reach
        height, width = (len(range(x.start, x.stop, self.stride)) for x in (rows, columns))
        return whole[:, :, :height, before : before + width]

    def learn(self, heads: slice, learned: list[Tensor]) -> None:
        """Compute it now, with its graph: tiles sum its gradient, which goes on from there once, whatever the length.

        Args:
            heads: of the tiles.
            learned: tensors that the tiles hand gradients to; it becomes one of them.
        """
        whole = self._whole()
        self.heads, self.place, self.held = heads, len(learned), whole.detach()
        learned.append(whole)

    def learned(self, rows: slice, columns: slice, sums: Sequence[Tensor], dscores: Tensor, batch: slice) -> None:
        """As `Part.learn`. What is hidden has no weight, hence no gradient."""
        del batch  # all rows share the bias
        into = sums[self.place]
        into = self._cut(into[:, self.heads] if into.shape[1] > 1 else into, rows, columns)
        into += dscores.sum_to_size(into.shape)

    def _whole(self) -> Tensor:
        """Of queries at `reach`, `reach` + 1, ... and all the keys that one of them sees, from `first` on."""
        call, device = self.call, self.call.q.device
        count = self.size + self.reach * (1 if call.pattern.causal else 2)
        # behind the first tokens, which all see: see first.py
        position = call.band.first + torch.arange(0, count * self.stride, self.stride, device=device)[None]
        keys = Layout.plain(1, count, device)._replace(position=position)
        queries = keys.cut(slice(self.reach, self.reach + self.size))
        whole = call.pattern.scores_bias(queries, keys)
        if call.pattern.causal:
            future = keys.position[:, None, :] > queries.position[:, :, None]
            whole = whole.masked_fill(future[:, None], -torch.inf)
        return whole


def by_distance(call: PatternCall, length: int) -> Tensor | None:
    """Position bias of a key d columns after the query, [H, 2 · length] at d + length, whatever the query.

    Schemes depend on the difference of positions alone.
    """
    if not call.has_position_bias:
        return None
    token = Layout.plain(1, 1, call.k.device, start=length)
    found = call.pattern.position_bias(token, Layout.plain(1, 2 * length, call.k.device))
    assert found is not None
    return found[0, :, 0]
