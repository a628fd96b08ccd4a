"""Tiles of a band: by plain arithmetic, where columns lie as positions do, and one mask for all of them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern.band_bias import BandBias
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import cuts, most_keys
from attention_zoo.ops.pattern.narrow import narrow_tiles
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
    bias = BandBias(call, size, reach, stride)
    if call.learned:
        bias.learn(heads, learned)
    tiles = []
    for key in range(min(stride, S)):  # first column of the class
        row = (key - (S - L)) % stride  # and its first query
        before = (row + S - L - key) // stride  # keys of the class before the first query
        rows, keys = len(range(row, L, stride)), len(range(key, S, stride))
        inner, found = narrow_tiles(call, heads, reach, learned) if stride == 1 else (slice(0, 0), [])
        tiles += found
        runs = [(a, min(a + size, inner.start)) for a in range(0, inner.start, size)]
        runs += [(a, min(a + size, rows)) for a in range(inner.stop, rows, size)]
        for start, stop in runs:
            low, high = max(0, start + before - reach), stop + before + (0 if call.pattern.causal else reach)
            some = slice(row + start * stride, row + (stop - 1) * stride + 1, stride)
            parts = []
            for a, b in cuts(low, min(keys, high), most_keys(call, size)):
                columns = slice(key + a * stride, key + (b - 1) * stride + 1, stride)
                learn = partial(bias.learned, some, columns) if call.learned else None
                parts.append(Part(columns, partial(bias, some, columns), learn=learn))
            tiles.append(Tile(some, parts, heads))
    return tiles


def by_distance(call: PatternCall, length: int) -> Tensor | None:
    """Position bias of a key d columns after the query, [H, 2 · length] at d + length, whatever the query.

    Schemes depend on the difference of positions alone.
    """
    if not call.has_position_bias:
        return None
    device, first = call.k.device, call.pattern.reach.first
    # behind the first tokens, whose distances may be others

    def find() -> tuple[Layout, Layout]:
        return Layout.plain(1, 1, device, start=first + length), Layout.plain(1, 2 * length, device, start=first)

    found = call.pattern.position_bias(*call.keys.plan(("distances", length, first), find))
    assert found is not None
    return found[0, :, 0]
