"""Tiles of a narrow band: for each head many blocks of few rows at once, each with its own window of keys.

A tile of 64 rows multiplies by 80 keys where a window of 16 shows 17 to each row. Blocks of about as many rows as the
window is long waste half of their products, not four fifths; one product for all blocks of a head makes them cheap.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.band_bias import BandBias
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import global_columns
from attention_zoo.ops.softmax.parts import Part, Windows
from attention_zoo.ops.softmax.tiles import Tile

REACH = 32
"""Longest window, in tokens per side. Of heads as wide as 64 a longer one is as fast in tiles."""
ROWS = 16
"""Fewest of a block."""
LEAST = 1024
"""Fewest rows in blocks: heads and batch rows are steps of their own, which cost more than they save in short rows."""
SCORES = 1 << 18
"""Scores of a step."""
GLOBALS = 16
"""Most global keys of a row, which each step sees besides."""


def narrow_tiles(call: PatternCall, heads: slice, reach: int, learned: list[Tensor]) -> tuple[slice, list[Tile]]:
    """The rows of a band without gaps that go into blocks, as all of their windows are whole, and tiles for them.

    Args:
        reach: keys of a window on each side; causal, the past alone.
        learned: what the tiles hand gradients to; a bias of these blocks is added where it learns.
    """
    (L, S), ahead = call.lengths, 0 if call.pattern.causal else reach
    size, before = max(ROWS, reach), S - L
    start = max(0, reach - before)
    blocks = (L - ahead - start) // size
    if blocks * size < LEAST or not _is_narrow(call, reach):
        return slice(0, 0), []
    most = max(1, SCORES // (size * (size + reach + ahead)))
    bias = BandBias(call, size, reach, 1)
    if call.learned:
        bias.learn(heads, learned)
    tiles = []
    for a in range(0, blocks, most):
        count, row = min(most, blocks - a), start + a * size
        windows = Windows(row + before - reach, size + reach + ahead, size, count)
        for head in range(*heads.indices(call.q.shape[1])):
            learn = partial(bias.learned_blocks, head) if call.learned else None
            part = Part(windows, partial(bias.blocks, windows, row, head), learn=learn)
            tiles.append(Tile(slice(row, row + count * size), [part], slice(head, head + 1)))
    return slice(start, start + blocks * size), tiles


def _is_narrow(call: PatternCall, reach: int) -> bool:
    few = not call.any_global_key or global_columns(call.keys)[0].shape[1] <= GLOBALS
    return reach <= REACH and few and facts.on_cpu(call) is None
