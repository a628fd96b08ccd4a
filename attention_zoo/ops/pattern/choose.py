"""The kernels of patterns, fastest first. Which of them a pattern has follows from its reach; see layout/kernel.py."""

from __future__ import annotations

from torch import Tensor

from attention_zoo.layout.kernel import Kernel
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.band import band_tiles
from attention_zoo.ops.pattern.blocks import BLOCKS
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.covered import COVERED
from attention_zoo.ops.pattern.few import with_common_keys
from attention_zoo.ops.pattern.first import turned_bias, with_first_keys, without_first
from attention_zoo.ops.pattern.flex import FLEX
from attention_zoo.ops.pattern.linked_row import LINKED_ROW
from attention_zoo.ops.pattern.local import run_local
from attention_zoo.ops.pattern.near import near_tiles
from attention_zoo.ops.pattern.row import ROW
from attention_zoo.ops.pattern.sdpa import SDPA
from attention_zoo.ops.pattern.short import SHORT
from attention_zoo.ops.pattern.short_band import SHORT_BAND
from attention_zoo.ops.pattern.triton_blocks import TRITON_BLOCKS
from attention_zoo.ops.pattern.xformers import XFORMERS
from attention_zoo.ops.softmax.dense import dense


def _run_dense(call: PatternCall) -> Tensor:
    bias = call.pattern.full_bias(call.queries, call.keys)
    if call.turned is not None:
        bias = bias + turned_bias(call)
    out = dense(call.q, call.k, call.v, bias, scale=call.scale, sink=call.sink)
    return call.blank(out)


DENSE: Kernel[PatternCall] = Kernel("dense", _run_dense, (), "the definition, L x S materialised: O(L·S) memory")


def _run_tiles(call: PatternCall) -> Tensor:
    call, common = with_common_keys(call)
    alone = without_first(call)
    tiles, learned = near_tiles(alone)
    tiles = tiles if alone is call else with_first_keys(call, tiles)
    return run_local(call, tiles, call.asked, learned=learned, common=common)


TILES: Kernel[PatternCall] = Kernel(
    "tiles", _run_tiles, (facts.turned_is_fixed,), "tiles that may matter, any positions; backward recomputes"
)


def _run_banded(call: PatternCall) -> Tensor:
    call, common = with_common_keys(call)
    tiles, learned = band_tiles(call)
    return run_local(call, with_first_keys(call, tiles), call.asked, learned=learned, common=common)


BANDED: Kernel[PatternCall] = Kernel(
    "banded",
    _run_banded,
    (facts.consecutive, facts.first_is_fixed),
    "evenly spaced keys per tile, one mask for all; backward recomputes",
    (facts.is_band_and_first,),
)

KERNELS: tuple[Kernel[PatternCall], ...] = (
    LINKED_ROW, ROW, SDPA, SHORT, SHORT_BAND, TRITON_BLOCKS, COVERED, FLEX, BLOCKS, BANDED, XFORMERS, TILES, DENSE,
)  # fmt: skip
"""Every kernel of patterns."""
