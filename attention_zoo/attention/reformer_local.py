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
from jaxtyping import Bool, Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens, at_least


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
    counts_keys = True
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
        chunk: int = 64,
        look_back: int = 1,
        look_ahead: int = 0,
        fill: int = 0,
        kernel: str = "auto",
        **shared: Any,
    ):
        at_least(1, chunk=chunk)
        at_least(0, look_back=look_back, look_ahead=look_ahead, fill=fill)
        super().__init__(kernel=kernel, **shared)
        self.chunk, self.look_back, self.fill = chunk, look_back, fill
        self.look_ahead = 0 if self.causal else look_ahead

    @property
    def abilities(self) -> Abilities:
        # how often a short ring shows a chunk depends on the length of the text
        return replace(self.declared, causality="values") if self.fill else self.declared

    @property
    def reach(self) -> int | None:
        if self.fill and not self.causal:
            return None
        return self.chunk * (max(self.look_back, self.look_ahead) + 1) - 1

    def near(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, length: Tensor
    ) -> Bool[Tensor, "#B q_tiles k_tiles"]:
        if self.reach is not None:
            return super().near(q_lo, q_hi, k_lo, k_hi, length)
        first, last = q_lo // self.chunk - self.look_back, q_hi // self.chunk + self.look_ahead
        ring = self._ring(length)
        around = (
            (k_hi // self.chunk + turn >= first) & (k_lo // self.chunk + turn <= last) for turn in (-ring, 0, ring)
        )
        return torch.stack(torch.broadcast_tensors(*around)).any(0)

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

    def _ring(self, length: Tensor) -> Tensor:
        """Chunks of a text."""
        filled = -(-length // self.fill) * self.fill
        return (-(-filled // self.chunk)).clamp(min=1)
