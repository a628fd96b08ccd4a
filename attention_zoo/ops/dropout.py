"""Dropout, drawn faster on a CPU: sixteen random bits an element, four elements a number. Srivastava et al. 2014.

torch draws a float for each element and keeps the mask as floats; the bits take less than half of the time, and the
mask a byte an element. Elsewhere, and in a compiled graph, it is torch's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STEPS = 2**16
"""A probability is rounded to one in so many; what is kept is scaled by just that, so that means stay the same."""


def dropped(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Elements are zero with probability p, the others larger by 1 / (1 - p).

    Args:
        generator: of x's device; default: torch's own.
    """
    least = round(p * STEPS)
    if least in (0, STEPS):
        return x * float(least == 0)
    if x.device.type == "cpu":
        words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= least - STEPS // 2
    else:
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
            1 - least / STEPS, generator=generator
        )
    return x * kept * (1 / (1 - least / STEPS))


class Dropout(nn.Dropout):
    """`nn.Dropout` for a skeleton: never in place.

    Args:
        p: probability to drop, in [0, 1].
    """

    def __init__(self, p: float):
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return dropped(x, self.p) if self.training and self.p else x
