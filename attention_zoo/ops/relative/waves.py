"""Tables of distances: sines and cosines, made once and shared by calls. Dai et al. 2019, §3.3."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

TABLE = 256
"""Tables are made for a multiple of this many distances, so that growing calls share one."""


def waves(
    distances: int, width: int, clamp: int | None, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "n E"]:
    """R of the distances from 0 on: sines, then cosines, [n, E]; above `clamp` they count as it. Do not modify."""
    return _table(-(-distances // TABLE) * TABLE, width, clamp, dtype, device)[:distances]


@lru_cache(maxsize=8)
def falling_waves(
    distances: int, width: int, clamp: int | None, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "m E"]:
    """The same from the largest distance down to 0, then a row of zeros, [n + 1, E]. Do not modify."""
    with torch.inference_mode(False):
        return torch.nn.functional.pad(waves(distances, width, clamp, dtype, device).flip(0), (0, 0, 0, 1))


@lru_cache(maxsize=8)
def _table(distances: int, width: int, clamp: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    # it may be asked for first where tensors are born unfit for gradients
    with torch.inference_mode(False):
        # angles in float32 at least: bfloat16 cannot count past 256
        exact = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, width, 2, device=device, dtype=exact) / width
        distance = torch.arange(distances, device=device, dtype=exact)
        if clamp is not None:
            distance = distance.clamp(max=clamp)
        angle = distance[:, None] * 10_000.0**-exponent
        return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)
