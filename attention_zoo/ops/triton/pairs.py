"""Rotary positions on CUDA: pairs of channels are turned in one pass, where torch takes three, each through memory.

Computed in float32 and rounded once. Nothing is summed, so any order gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

PAIRS = 2048
"""Pairs that a program of four warps turns: what its registers hold of both halves, with their angles."""


@triton.jit
def _turn(
    x, out, cos, sin, x_b, x_h, x_l, o_b, o_h, o_l, a_b, H, L, D: tl.constexpr, WAY: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of T tokens of one head: (x, y) becomes (x cos - y sin, y cos + x sin), against WAY = -1 the other way round."""
    parts = tl.cdiv(L, T)
    row, head = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    b, h = head // H, head % H
    token, d = row.to(tl.int64) * T + tl.arange(0, T), tl.arange(0, BD)
    inside = (token < L)[:, None] & (d < D // 2)[None, :]
    angle = b * a_b + token[:, None] * D + d[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + D // 2, mask=inside, other=0.0).to(tl.float32) * WAY
    at = x + b * x_b + h * x_h + token[:, None] * x_l + d[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    to = out + b * o_b + h * o_h + token[:, None] * o_l + d[None, :]
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + D // 2, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def turned(
    x: Float[Tensor, "B H L D"], cos: Float[Tensor, "B 1 L D"], sin: Float[Tensor, "B 1 L D"], way: int, out: Tensor
) -> Tensor:
    """x with each pair turned by its angle, written into `out` of the same shape.

    Args:
        x: channels of a head side by side in memory; float32, float16 or bfloat16.
        cos, sin: what channels and their partners are multiplied by, contiguous; of one row, or of each.
        way: 1, or -1 for back.
    """
    B, H, L, D = x.shape
    if x.numel():
        BD = triton.next_power_of_2(D // 2)
        T = max(1, min(PAIRS // BD, triton.next_power_of_2(L)))
        _turn[(triton.cdiv(L, T) * B * H,)](
            x, out, cos, sin, *x.stride()[:3], *out.stride()[:3], L * D if len(cos) > 1 else 0, H, L,
            D=D, WAY=way, BD=BD, T=T, num_warps=4,
        )  # fmt: skip
    return out


def takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `turned` does: float64 is the definition's, which torch computes."""
    return (
        x.ndim == 4 and x.stride(-1) == 1 and x.dtype != torch.float64 and cos.is_contiguous() and sin.is_contiguous()
    )
