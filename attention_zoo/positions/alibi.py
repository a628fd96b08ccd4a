"""Attention with linear biases: subtract slope · distance from the scores. Press et al. 2022, §3.

Two-sided attention uses |distance|. Slopes are 2^(-8h/H) for h = 1..H, also where H is no power of two (the released
code interleaves a second series there; the geometric one needs no such case).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.constants import made_once
from attention_zoo.contract import Tokens
from attention_zoo.positions.scheme import AttentionPositions


class Alibi(AttentionPositions):
    """`bias(queries, keys)` is [B, H, L, S] and never positive."""

    has_bias = True

    def bias(self, queries: Tokens, keys: Tokens, dtype: torch.dtype) -> Tensor:
        distance = (queries.position[:, :, None] - keys.position[:, None, :]).abs()
        slope = _slopes(self.heads, like=distance, dtype=dtype)
        return -slope[:, None, None] * distance[:, None].to(dtype)


@made_once
def _slopes(heads: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads)
    return slope.to(torch.promote_types(dtype, torch.float32)).to(device, dtype)
