"""Heads that reach differently far, run apart: in groups of similar reach, so that each costs what it sees itself.

The heads of a group are one call of their own, under a pattern that is the same but for the other heads. Operands are
put in the order of the groups once, which costs a copy where heads of one group do not stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.constants import constant
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.reach import Band, Reach
from attention_zoo.ops.pattern.call import Pattern, PatternCall
from attention_zoo.tokens import Tokens

Heads = tuple[int, ...]


def reach_by_head(reach: Reach) -> tuple[int, ...] | None:
    """How far back each head reaches, where heads differ in that alone; None: they do not, or in more."""
    if not (isinstance(reach, Band) and isinstance(reach.back, tuple) and isinstance(reach.stride, int)):
        return None
    return reach.back if reach.ahead in (None, reach.back) and not reach.first else None


def groups_of(back: Sequence[int], shared: int, tile: int) -> tuple[Heads, ...]:
    """Key heads in groups of similar reach, the farthest first: none costs more than twice what it would alone.

    Args:
        back: how far back each query head reaches.
        shared: how many consecutive ones share a key head.
        tile: queries of a tile, whose own keys a head costs whatever it reaches.
    """
    each = [max(back[head : head + shared]) for head in range(0, len(back), shared)]
    groups: list[list[int]] = []
    for head in sorted(range(len(each)), key=lambda head: -each[head]):
        if groups and 2 * (each[head] + tile) > each[groups[-1][0]] + tile:
            groups[-1].append(head)
        else:
            groups.append([head])
    return tuple(tuple(sorted(group)) for group in groups)


def query_heads(heads: Heads, shared: int) -> Heads:
    """Those that share these key heads."""
    return tuple(head * shared + index for head in heads for index in range(shared))


def split(x: Tensor, groups: Sequence[Heads]) -> Sequence[Tensor]:
    """The heads of each group, [B, h, L, D] of [B, H, L, D]; together the groups hold every head once."""
    order = list(chain(*groups))
    if order != list(range(len(order))):
        x = x.index_select(1, constant(order, like=x, dtype=torch.long))
    return x.split([len(group) for group in groups], 1)


def merge(parts: Sequence[Tensor], groups: Sequence[Heads]) -> Tensor:
    """What `split` took apart, in the order of heads again."""
    order = list(chain(*groups))
    whole = torch.cat([part.transpose(1, 2) for part in parts], 2)  # as the next projection reads it
    if order != list(range(len(order))):
        place = sorted(range(len(order)), key=order.__getitem__)
        whole = whole.index_select(2, constant(place, like=whole, dtype=torch.long))
    return whole.transpose(1, 2)


def runs_whole(kernels: Sequence[Kernel[PatternCall]], wanted: str, call: PatternCall) -> bool:
    """Whether heads differ, and a kernel that may be taken runs them in one call at no more cost."""
    if reach_by_head(call.pattern.reach) is None:
        return False
    able = (each for each in kernels if each.whole and wanted in ("auto", each.name))
    return any(all(fact(call) is None for fact in each.needs) for each in able)


def apart(call: PatternCall) -> tuple[list[PatternCall], list[Heads]] | None:
    """A call for each group of heads, and the query heads of each; None: all heads reach about as far."""
    back, (H, K) = reach_by_head(call.pattern.reach), (call.q.shape[1], call.k.shape[1])
    groups = () if back is None else groups_of(back, H // K, call.pattern.tile)
    if len(groups) < 2:
        return None
    queries = [query_heads(group, H // K) for group in groups]
    operands = zip(split(call.q, queries), split(call.k, groups), split(call.v, groups))
    patterns = [SomeHeads(call.pattern, heads) for heads in queries]
    return [
        replace(call, pattern=pattern, q=q, k=k, v=v, sink=pattern.of(call.sink))
        for pattern, (q, k, v) in zip(patterns, operands)
    ], queries


class SomeHeads:
    """A pattern of which there are only these heads, reaching as far as the farthest of them."""

    def __init__(self, pattern: Pattern, heads: Heads):
        back = reach_by_head(pattern.reach)
        self.pattern, self.heads, self.causal, self.tile = pattern, heads, pattern.causal, pattern.tile
        self.reach: Reach = pattern.reach
        if back is not None:
            assert isinstance(pattern.reach, Band)
            mine, weights = {back[head] for head in heads}, pattern.reach.weights
            if len(mine) > 1 and weights == "uniform":
                weights = "distance"  # the farthest's reach is not the definition of the others
            self.reach = replace(pattern.reach, back=max(mine), ahead=None, weights=weights)

    def of(self, x: Float[Tensor, " H"] | None) -> Float[Tensor, " h"] | None:
        """What there is of each head, of these."""
        return None if x is None else x.index_select(0, constant(self.heads, like=x, dtype=torch.long))

    @property
    def has_position_bias(self) -> bool:
        return self.pattern.has_position_bias

    def bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        return self._mine(self.pattern.bias(queries, keys))

    def scores_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        return self._mine(self.pattern.scores_bias(queries, keys))

    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None:
        bias = self.pattern.position_bias(queries, keys)
        return None if bias is None else self._mine(bias)

    def full_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        return self._mine(self.pattern.full_bias(queries, keys))

    def _mine(self, bias: Tensor) -> Tensor:
        if bias.shape[1] == 1:
            return bias
        return bias.index_select(1, constant(self.heads, like=bias, dtype=torch.long))
