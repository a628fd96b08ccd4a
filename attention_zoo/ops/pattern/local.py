"""A pattern's tiles, run: with global tokens merged in, and rows of small scores known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import with_global_keys, with_global_queries
from attention_zoo.ops.pattern.mild import mild_rows
from attention_zoo.ops.softmax.common import Common
from attention_zoo.ops.softmax.tiles import Tile, run_tiles


def run_local(
    call: PatternCall,
    local: list[Tile],
    asked: Tensor | None,
    first: int | None = None,
    learned: Sequence[Tensor] | None = None,
    common: Common | None = None,
) -> Tensor:
    """Run the local tiles of a pattern, with global keys merged in, and global rows in place of what it gave them.

    Args:
        asked: which rows are queries, as `PatternCall.asked`.
        first: see `mild_rows`.
        learned: what the biases of the tiles learn by; default what the pattern's own does.
        common: global keys that all tiles see together; then no tile has them for itself.
    """
    if first is None and call.own_keys:
        first = call.k.shape[2] - call.q.shape[2]
    tiles = with_global_queries(call, with_global_keys(call, local) if common is None else local)
    mild = mild_rows(call, first)
    learned = call.learned if learned is None else learned
    return run_tiles(
        call.q, call.k, call.v, tiles, scale=call.scale, learned=learned, mild=mild, asked=asked, sink=call.sink,
        turned=call.turned, common=common,
    )  # fmt: skip
