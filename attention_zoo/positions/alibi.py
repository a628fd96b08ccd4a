"""Attention with linear biases: subtract slope · distance from the scores. Press et al. 2022, §3.

Two-sided attention uses |distance|. Slopes are 2^(-8h/H) for h = 1..H, also where H is no power of two (the released
code interleaves a second series there; the geometric one needs no such case).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.positions.scheme import AttentionPositions


class Alibi(AttentionPositions):
    """`bias(queries, keys)` is [B, H, L, S] and never positive."""

    has_bias = True
    slope: Tensor

    def __init__(self, *, heads: int, head_width: int):
        super().__init__(heads=heads, head_width=head_width)
        slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        self.register_buffer("slope", slope.to(torch.get_default_dtype()), persistent=False)

    def bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        distance = (queries.position[:, :, None] - keys.position[:, None, :]).abs()
        return -self.slope[:, None, None] * distance[:, None].to(self.slope.dtype)
