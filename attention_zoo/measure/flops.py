"""How many floating-point operations a call needs by its definition, whatever the kernel spends.

torch's FlopCounterMode counts nothing for fused attention on a CPU (pytorch#195460) and never the savings of a mask, so
attention is counted here: 4·D for every query-key pair that the definition lets see each other. Projections are counted
as executed. Backward counts twice the forward, without what a kernel recomputes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens
from attention_zoo.layout.reach import Tiles
from attention_zoo.model.wrapper import Wrapper

TILE, COLUMNS = 64, 2**14
EXACT_TILES = 64
"""Up to so many query tiles (4096 tokens) every one is counted; above, as many are taken as a sample."""


class LinearFlops(TorchFunctionMode):
    """Counts the FLOPs of a layer's projections inside the context, as executed.

    with LinearFlops(layer) as linear:
        layer(x)
    linear.flops
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.flops, self._matrices = 0, {id(parameter): parameter for parameter in layer.parameters()}

    def __torch_function__(self, function: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        # not by hooks on the modules: a layer that knows how to compute past them would take another way
        if function is nn.functional.linear and id(given[1]) in self._matrices:
            self.flops += 2 * given[0].numel() * given[1].shape[0]
        found = function(*given, **(named or {}))
        if function is torch.cat and all(id(part) in self._matrices for part in given[0]):
            self._matrices[id(found)] = found  # several projections as one
        if function is Tensor.__getitem__ and id(given[0]) in self._matrices:
            self._matrices[id(found)] = found  # some of them
        return found


def attention_flops(pairs: float, *, batch: int, heads: int, head_width: int) -> int:
    """A dot product and a weighted value for each pair of each head: 4·D."""
    return round(4 * head_width * batch * heads * pairs)


def count_pairs(layer: Attention, length: int, *, last_row_only: bool = False) -> float | None:
    """Query-key pairs that one call over `length` tokens scores, per head.

    Args:
        layer: its own `pairs` counts where it gives a number; a wrapper is counted from its `calls`, a pattern from its
            definition, by tiles of queries, so that nothing of size L x L ever exists.
        last_row_only: the pairs of one decoding step, whose token is the last of `length`.

    Returns:
        Exact up to 4096 tokens or with a formula; above, from a sample of query tiles that takes every tile near both
        ends (where global and border blocks are) and evenly spaced ones between. None without formula and pattern.
    """
    formula = layer.step_pairs(length) if last_row_only else layer.pairs(length)
    if formula is not None:
        return formula
    if isinstance(layer, Wrapper):
        return _inside(layer, length, last_row_only=last_row_only)
    if not isinstance(layer, PatternAttention):
        return None
    device = next(layer.parameters()).device
    tokens = layer.mark(Tokens.all_valid(1, length, device))
    if last_row_only:
        return _seen(layer, tokens, slice(length - 1, length))
    tiles = [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]
    if len(tiles) <= EXACT_TILES:
        return sum(_seen(layer, tokens, rows) for rows in tiles)
    edge = EXACT_TILES // 4
    middle = tiles[edge:-edge]
    step = len(middle) / (EXACT_TILES - 2 * edge)
    sample = [middle[int((number + 0.5) * step)] for number in range(EXACT_TILES - 2 * edge)]
    ends = sum(_seen(layer, tokens, rows) for rows in (*tiles[:edge], *tiles[-edge:]))
    return ends + sum(_seen(layer, tokens, rows) for rows in sample) * len(middle) / len(sample)


def _inside(wrapper: Wrapper, length: int, *, last_row_only: bool) -> float | None:
    """Pairs of the calls of what stands inside."""
    if not isinstance(wrapper.inner, Attention):
        return None
    calls = wrapper.calls(length)
    if last_row_only:
        calls = tuple((columns, 1) for columns, _ in calls[-1:])
    found = [count_pairs(wrapper.inner, columns, last_row_only=last_row_only) for columns, _ in calls]
    known = [pairs * times for pairs, (_, times) in zip(found, calls) if pairs is not None]
    return sum(known) if known and len(known) == len(calls) else None


@torch.no_grad()
def _seen(layer: PatternAttention, tokens: Tokens, rows: slice) -> float:
    """Keys seen by these rows together, averaged over heads. its reach spares the key tiles that cannot matter."""
    queries = tokens.cut(rows)
    length = tokens.valid.shape[1]
    start = np.arange(0, length, TILE)[None, None, :]
    first, last = (np.array(int(queries.position[0, at])).reshape(1, 1, 1) for at in (0, -1))
    tiles = Tiles(first, last, start, (start + TILE - 1).clip(max=length - 1), np.full((1, 1, 1), length), TILE)
    near = np.broadcast_to(layer.reach.near(tiles), start.shape).reshape(-1)
    if bool(queries.is_global.any()):
        near = np.ones_like(near)
    needed = torch.from_numpy(near.repeat(TILE)[:length]) | tokens.is_global[0]
    if layer.causal:
        needed = needed & (tokens.position[0] <= int(last.item()))
    columns = needed.nonzero().flatten()
    seen = 0.0
    for some in columns.split(COLUMNS):
        bias = layer.full_bias(queries, tokens.cut(some))
        seen += float((bias > -torch.inf).sum(dtype=torch.float64)) / bias.shape[1]
    return seen
