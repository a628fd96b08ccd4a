"""Attention with linear biases: subtract slope · distance from the scores. Press et al. 2022, §3.

Two-sided attention uses |distance|. Slopes are 2^(-8h/H) for h = 1..H, also where H is no power of two (the released
code interleaves a second series there; the geometric one needs no such case).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attention_zoo.constants import constant, numbers
from attention_zoo.contract import Tokens
from attention_zoo.options import Heads, Positive
from attention_zoo.positions.scheme import AttentionPositions


class Alibi(AttentionPositions):
    """`bias(queries, keys)` is [B, H, L, S] and never positive."""

    has_bias = True

    def __init__(self, *, heads: Heads, head_width: Positive):
        super().__init__(heads=heads, head_width=head_width)
        self.slopes = _slopes(heads)

    def bias(self, queries: Tokens, keys: Tokens, dtype: torch.dtype) -> Tensor:
        distance = (queries.position[:, None, :, None] - keys.position[:, None, None, :]).abs()
        falls = constant(tuple(-slope for slope in self.slopes), like=distance, dtype=dtype, axes=3)
        return falls * distance.to(dtype)


@lru_cache(maxsize=64)
def _slopes(heads: int) -> tuple[float, ...]:
    """[H], by torch's own power, whose last bit is not always Python's."""
    return numbers(lambda: 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads))
