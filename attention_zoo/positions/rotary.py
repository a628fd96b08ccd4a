"""Rotary positions: turn each pair of channels by an angle that grows with position. Su et al. 2021, eq. 34.

The two halves of a head form the pairs (x_i, x_{i + D/2}), as in the Llama family, not neighbouring channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.positions.scheme import AttentionPositions


class Rotary(AttentionPositions):
    """`rotate(x, position)` keeps norms, and q·k depends on the difference of positions alone.

    Args:
        base: wavelength of the slowest pair over 2π, in tokens.
    """

    def __init__(self, *, heads: int, head_width: int, base: float = 10_000.0):
        super().__init__(heads=heads, head_width=head_width)
        if head_width % 2:
            raise ValueError(f"positions=rotary needs an even head_width, got {head_width}")
        self.base = base

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        half = self.head_width // 2
        # angles in float32 at least: bfloat16 cannot count past 256
        exact = torch.promote_types(x.dtype, torch.float32)
        step = self.base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
        angle = position.to(exact)[..., None] * step
        angle = angle.view(position.shape[0], *[1] * (x.ndim - 3), position.shape[1], half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
