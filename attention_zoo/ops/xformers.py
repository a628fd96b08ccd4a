"""xformers' memory-efficient attention with a local mask: FlashAttention with a window, for plain bands.

Causal documents and padding, wherever it lies, run as one row without padding under a block-diagonal mask. What it has
no mask for (global tokens, holes, dilation, position biases, documents that are seen from both sides) is refused and
left to `flex` or `banded`. Two-sided windows exist for half precision alone. Not measured yet on a GPU, hence taken
only by name: whatever it can run, `banded` runs before it. Imported only when a call might run here.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
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


def documents_mask(call: PatternCall) -> tuple[Any, Tensor]:
    """The attn_bias of causal bands in several documents, and the valid columns that it is for, flat [n].

    Documents of all batch rows stand one after the other, without padding.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    assert call.pattern.reach is not None
    valid, document = call.keys.valid, call.keys.document
    index = valid.flatten().nonzero()[:, 0]
    row = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[1:] = (row[valid].diff() != 0) | (document[valid].diff() != 0)
    borders = [*starts.nonzero()[:, 0].tolist(), len(index)]
    lengths = [b - a for a, b in pairwise(borders)]
    return BlockDiagonalMask.from_seqlens(lengths).make_local_attention(call.pattern.reach + 1), index


def _run(call: PatternCall) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))  # [B, L, H, D]
    if call.starts_at_zero:
        return call.blank(_attend(q, k, v, local_mask(call), call.scale).transpose(1, 2))
    mask, index = documents_mask(call)
    rows, keys, values = (x.flatten(0, 1)[index][None] for x in (q, k, v))
    packed = _attend(rows, keys, values, mask, call.scale)
    out = packed.new_zeros(len(q) * q.shape[1], *packed.shape[2:]).index_copy(0, index, packed[0])
    return out.view(q.shape).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    """[B, L, H, D] of q and [B, S, K, D] of k and v."""
    from xformers.ops import memory_efficient_attention

    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        # [B, L, K, H / K, D], keys and values repeated without a copy
        q = q.unflatten(2, (-1, groups))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, groups, -1) for x in (k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
    return out.flatten(2, 3) if groups > 1 else out


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
    plain = call.starts_at_zero
    if not plain and not (call.aligned and call.q.shape[2] == call.k.shape[2]):
        return "its masks know no holes, and no documents behind earlier keys"
    if not pattern.causal and not (plain and call.all_valid):
        return "its masks cannot hide padding or other documents from a two-sided window"
    if not plain and not bool(call.keys.valid.any()):
        return "there are no tokens"
    if call.q.shape[3] > 256 or call.q.shape[3] % 8:
        return f"heads must be a multiple of 8 wide, at most 256, not {call.q.shape[3]}"
    return None


XFORMERS = Kernel("xformers", _run, _refuse, "FlashAttention with a window, through xformers")
