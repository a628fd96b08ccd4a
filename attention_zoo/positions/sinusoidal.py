"""Sinusoidal positions: each pair of channels turns at its own wavelength. Vaswani et al. 2017, §3.5.

The first half of the channels holds the sines and the second half the cosines, where the paper interleaves them: the
same code under a fixed permutation of channels. Any position has one, so streams may grow without end.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.options import Positive, checked


class Sinusoidal(nn.Module):
    """Position -> vector, without parameters.

    Args:
        dim: model width E, even.
        max_length: not used; the scheme knows no end.
        base: wavelength of the slowest pair over 2π, in tokens.
    """

    options: ClassVar[tuple[str, ...]] = ("base",)

    @checked(prefix="positions.")
    def __init__(
        self,
        *,
        dim: Positive,
        max_length: Positive | None = None,
        base: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 10_000.0,
    ):
        super().__init__()
        if dim % 2:
            raise ValueError(f"positions=sinusoidal needs an even dim, got {dim}")
        self.dim, self.base = dim, base

    def forward(self, position: Int[Tensor, "*B L"], *, last: int | None = None) -> Float[Tensor, "*B L E"]:
        """In float64. `last` is of no interest to it."""
        half = self.dim // 2
        # float64 for the angle alone: float32 is off by 0.06 radians at position 10⁶
        step = self.base ** (-torch.arange(half, device=position.device, dtype=torch.float64) / half)
        angle = position[..., None] * step
        return torch.cat([angle.sin(), angle.cos()], -1)
