"""xformers' memory-efficient attention with a local mask: FlashAttention with a window, for plain bands.

Two-sided windows exist for half precision alone. What it has no mask for (global tokens, holes, dilation, position
biases, padding on the left) is refused and left to `flex` or `banded`. Not measured yet on a GPU, hence taken only by
name: whatever it can run, `banded` runs before it. Imported only when a call might run here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from attention_zoo.ops.dispatch import Kernel
from attention_zoo.ops.pattern_call import PatternCall


def local_mask(call: PatternCall) -> Any:
    """The attn_bias of a band: so many keys back, and as many ahead or none."""
    from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

    reach = call.pattern.reach
    assert reach is not None
    return LocalAttentionFromBottomRightMask(window_left=reach, window_right=0 if call.pattern.causal else reach)


def _run(call: PatternCall) -> Tensor:
    from xformers.ops import memory_efficient_attention

    groups = call.q.shape[1] // call.k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))  # [B, L, H, D]
    if groups > 1:
        # [B, L, K, H / K, D], keys and values repeated without a copy
        q = q.unflatten(2, (-1, groups))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, groups, -1) for x in (k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=local_mask(call), scale=call.scale)
    return (out.flatten(2, 3) if groups > 1 else out).transpose(1, 2)


def _refuse(call: PatternCall) -> str | None:
    if call.q.device.type != "cuda":
        return f"it runs on CUDA, not on {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"its windows exist in half precision, not in {call.q.dtype}".replace("torch.", "")
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return unfit(call)


def unfit(call: PatternCall) -> str | None:
    """Why its masks cannot say this call, on any device, or None."""
    pattern = call.pattern
    if not (pattern.shift_invariant and pattern.unweighted) or pattern.reach is None:
        return "the pattern is no band"
    if not getattr(pattern, "contiguous", False):
        return "the band has gaps (dilation)"
    if call.has_position_bias:
        return "the position scheme adds to the scores"
    if call.any_global_key or call.any_global_query:
        return "its masks know no global tokens"
    if not call.starts_at_zero:
        return "its masks know no documents, holes or padding on the left"
    if not call.all_valid and not pattern.causal:
        return "its masks cannot hide padding from a two-sided window"
    if call.q.shape[3] > 256 or call.q.shape[3] % 8:
        return f"heads must be a multiple of 8 wide, at most 256, not {call.q.shape[3]}"
    return None


XFORMERS = Kernel("xformers", _run, _refuse, "FlashAttention with a window, through xformers")
