"""xformers' memory-efficient attention with a local mask: FlashAttention with a window, for plain bands.

Causal documents and padding, wherever it lies, run as one row without padding under a block-diagonal mask. What it has
no mask for (global tokens, holes, dilation, position biases, documents that are seen from both sides) is refused and
left to `flex` or `banded`. Two-sided windows exist for half precision alone. Not measured yet on a GPU, hence taken
only by name: whatever it can run, `banded` runs before it. Imported only when a call might run here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.ragged import ragged
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall


def local_mask(call: PatternCall) -> Any:
    """The attn_bias of a band: so many keys back, and as many ahead or none."""
    from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask

    reach = call.band.farthest
    return LocalAttentionFromBottomRightMask(window_left=reach, window_right=0 if call.pattern.causal else reach)


def documents_mask(call: PatternCall) -> tuple[Any, Tensor]:
    """The attn_bias of causal bands in several documents, and the valid columns that it is for, flat [n].

    Documents of all batch rows stand one after the other, without padding.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    index, lengths = ragged(call.keys)
    return BlockDiagonalMask.from_seqlens(lengths.tolist()).make_local_attention(call.band.farthest + 1), index


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


def _has_gaps(call: PatternCall) -> str | None:
    return facts.is_plain_band(call.pattern)


def _is_installed(call: PatternCall) -> str | None:
    return "xformers is not installed" if importlib.util.find_spec("xformers") is None else None


def _knows_documents(call: PatternCall) -> str | None:
    if call.starts_at_zero or (call.aligned and call.q.shape[2] == call.k.shape[2]):
        return None
    return "its masks know no holes, and no documents behind earlier keys"


def _hides_padding(call: PatternCall) -> str | None:
    if call.pattern.causal or (call.starts_at_zero and call.all_valid):
        return None
    return "its masks cannot hide padding or other documents from a two-sided window"


def _has_tokens(call: PatternCall) -> str | None:
    return None if call.starts_at_zero or bool(call.keys.host.valid.any()) else "there are no tokens"


def _takes_width(call: PatternCall) -> str | None:
    width = call.q.shape[3]
    return f"heads must be a multiple of 8 wide, at most 256, not {width}" if width > 256 or width % 8 else None


FITS = (facts.no_position_bias, facts.no_globals, _knows_documents, _hides_padding, _has_tokens, _takes_width)
"""What its masks need on any device."""
XFORMERS: Kernel[PatternCall] = Kernel(
    "xformers",
    _run,
    (facts.on_cuda, facts.no_sink, facts.half_precision, _is_installed, _has_gaps, *FITS),
    "FlashAttention with a window, through xformers",
    (facts.is_band, facts.is_uniform),
)
