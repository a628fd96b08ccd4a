"""Columns that are held by groups of heads, each of which forgets by itself what its own heads no longer see.

Which heads a group has is a fact of the state, fixed where it begins: what a head sees may change between two calls
(a span that is trained), and then only how much is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon

Heads = tuple[int, ...]


class ByHeads(NamedTuple):
    """What a layer holds, by groups of key heads.

    Fields:
        parts: columns of each group, buffers [B, h, room, D].
        heads: which key heads each has; together every one once.
    """

    parts: tuple[Columns, ...]
    heads: tuple[Heads, ...]

    @property
    def holds(self) -> tuple[int, ...]:
        """As of `Columns`."""
        batch, *_, width = self.parts[0].holds
        return batch, sum(part.holds[1] for part in self.parts), width

    def append(self, layout: Layout, *tensors: Sequence[Tensor], horizons: Sequence[Horizon]) -> ByHeads:
        """Followed by the columns of a call; of each tensor that of each group, [B, h, n, D]."""
        parts = zip(self.parts, zip(*tensors), horizons)
        return ByHeads(tuple(part.append(layout, *new, horizon=horizon) for part, new, horizon in parts), self.heads)

    def settle(self, layout: Layout, *, horizons: Sequence[Horizon]) -> ByHeads:
        """What is kept after the call that brought these columns last."""
        parts = zip(self.parts, horizons)
        return ByHeads(tuple(part.settle(layout, horizon=horizon)[0] for part, horizon in parts), self.heads)
