"""Reformer's local layers: attention inside chunks of text and to their neighbours. Kitaev et al. 2020, released code.

A token sees its own chunk of `chunk` tokens, `look_back` chunks before it and, two-sided, `look_ahead` chunks after it.
O(L·chunk). A companion of `reformer`, whose models mix such layers with hashed ones; plain dot products with 1/sqrt(D).

In the released code chunks form a ring also here: the first looks back to the last (which matters two-sided), and where
the window is longer than the ring a chunk counts twice. Text has ends by default; `fill` makes it a ring.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.host import Array
from attention_zoo.layout.reach import Band, Reach, Tiles
from attention_zoo.options import Around, Chunk, Fill


class ReformerLocal(PatternAttention):
    """Attention to the own chunk and its neighbours.

    Args:
        chunk: tokens in a chunk.
        look_back: chunks before the own one that are seen.
        look_ahead: chunks after it; causal, there are none to see.
        fill: 0: text has ends. Else the chunks of a text form a ring, whose length is `Tokens.length` filled up to a
            multiple of `fill`; see `Reformer`.
        kernel: auto | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "reformer.local"
    tiny = {"chunk": 3}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="first_call",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        chunk: Chunk = 64,
        look_back: Around = 1,
        look_ahead: Around = 0,
        fill: Fill = 0,
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(kernel=kernel, **shared)
        self.chunk, self.look_back, self.fill = chunk, look_back, fill
        self.look_ahead = 0 if self.causal else look_ahead

    @property
    def abilities(self) -> Abilities:
        # how often a short ring shows a chunk depends on the length of the text
        return replace(self.declared, causality="values") if self.fill else self.declared

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        if self.fill and not self.causal:
            return _Ring(self)
        return Band(self.chunk * (max(self.look_back, self.look_ahead) + 1) - 1, weights="counts")

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B 1 L S"]:
        mine, theirs = (tokens.position // self.chunk for tokens in (queries, keys))
        step = (theirs[:, None, :] - mine[:, :, None])[:, None]
        if not self.fill:
            return hide((step >= -self.look_back) & (step <= self.look_ahead))
        ring = self._ring(queries.length)[:, None, :, None]
        times = torch.zeros_like(step)
        for turn in range(-self.look_back, self.look_ahead + 1):
            # a turn of the whole ring or more stays at the own chunk, in the released code
            times = times + ((step - torch.where(ring > abs(turn), turn, 0)) % ring == 0)
        return times.double().log()  # of float32 it would be off by 1e-8 in a model of float64

    def _ring(self, length: Any) -> Any:
        """Chunks of a text."""
        filled = -(-length // self.fill) * self.fill
        return (-(-filled // self.chunk)).clip(1)


class _Ring(Reach):
    """Chunks of a text that goes round."""

    weights = "counts"

    def __init__(self, layer: ReformerLocal):
        self.layer = layer

    def near(self, tiles: Tiles) -> Array:
        layer = self.layer
        first, last = tiles.q_lo // layer.chunk - layer.look_back, tiles.q_hi // layer.chunk + layer.look_ahead
        low, high, ring = tiles.k_lo // layer.chunk, tiles.k_hi // layer.chunk, layer._ring(tiles.length)
        found = (high >= first) & (low <= last)
        for turn in (-ring, ring):
            found = found | ((high + turn >= first) & (low + turn <= last))
        return found
