"""torch's fused scaled_dot_product_attention, on the fastest of its engines.

Left to itself torch takes FlashAttention 2 on CUDA, also on Hopper, where cuDNN's engine is reported to be about twice
as fast (pytorch#142132). Order of preference there: cuDNN, flash, memory-efficient. The fourth engine, which
materialises L x S, is never taken on CUDA: what the three cannot run (float64) is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ENGINES = {
    True: [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    False: [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
"""Engines in order of preference, from Hopper on and before it."""
HALF = (torch.float16, torch.bfloat16)
SMALL = 2**14
"""Numbers of a head up to which the backward in half precision takes longer than that in float32 also where a CPU has
units for matrices (AMX): a block's product costs more to set up than to run. 10 times at 118 x 32, 1.5 at 128 x 64, as
fast at 256 x 64, 0.7 beyond. Without such units it always takes longer: with AVX2 up to 7 times, with AVX-512 alone 2.5
to 3.3 times at 128 to 4,096 tokens of width 32 to 128 (one thread). Forward alone it is as fast."""


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, causal: bool = False) -> Tensor:
    """Attention [B, H, L, D] x [B, K, S, D]; O(L) memory beside what is given.

    Args:
        bias: added to the scores, in the dtype of q, [B|1, H|1, L|1, S].
        causal: hide later columns; then L is S and there is no bias.
    """
    grouped = q.shape[1] != k.shape[1]
    if not q.is_cuda:
        options: Any = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
        if not _is_slow(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=wide, **options)
        return out.to(q.dtype)
    if grouped and (q.dtype not in HALF or bias is not None):
        # the memory-efficient engine knows no groups; torch would silently materialise instead
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    if bias is not None:
        bias = bias.expand(-1, q.shape[1], q.shape[2], -1)
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    with sdpa_kernel(ENGINES[hopper], set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def _is_slow(*operands: Tensor) -> bool:
    """Whether a backward may come that this CPU runs faster in float32."""
    if operands[0].dtype not in HALF or not torch.is_grad_enabled() or not any(x.requires_grad for x in operands):
        return False
    return not _has_units() or min(x.shape[2] * x.shape[3] for x in operands) <= SMALL


def _has_units() -> bool:
    """Whether this CPU multiplies matrices of half precision, and torch may use that."""
    has: bool = torch.cpu._is_amx_tile_supported()
    return has and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def refuse(q: Tensor) -> str | None:
    """Why no engine with O(L) memory takes these operands, or None."""
    if q.is_cuda and q.dtype not in (torch.float32, *HALF):
        return f"no fused engine on CUDA takes {str(q.dtype).removeprefix('torch.')}"
    return None
