"""torch's fused attention on every key, where a pattern hides nothing but padding, documents and the future."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.layout.kernel import Kernel
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.softmax.fused import fused


def run_sdpa(call: PatternCall) -> Tensor:
    """The call, whose pattern hides and weighs nothing; a mask of L x S where its tokens need one."""
    q, k, v = call.q, call.k, call.v
    if facts.unmasked(call) is not None:
        mask, rows = _planned(call)
        return call.blank_rows(fused(q, k, v, mask, scale=call.scale), rows)
    if call.pattern.causal and q.shape[2] > 1:
        # right padding lies in the future of every valid token
        return call.blank(fused(q, k, v, scale=call.scale, causal=True))
    if call.all_valid:
        return call.blank(fused(q, k, v, scale=call.scale))
    seen = call.keys.valid[:, None, None, :]
    return call.blank(fused(q, k, v, _mask(seen, q.dtype), scale=call.scale), seen)


def _planned(call: PatternCall) -> tuple[Tensor, Tensor]:
    """What is added to the scores, and which rows see something, once for all layers: backward keeps the first."""

    def find() -> tuple[Tensor, Tensor, object]:
        rows = slice(0, 1 if call.rows_alike else None)
        seen = call.seen(call.queries.cut(slice(None), rows), call.keys.cut(slice(None), rows))
        with torch.inference_mode(False):  # they may outlive the call
            return _mask(seen, call.q.dtype), call.seeing(seen), call.queries

    key = ("mask", id(call.queries), call.pattern.causal, call.one_document, call.rows_alike, call.q.dtype)
    mask, seeing, _ = call.keys.plan(key, find)
    return mask, seeing


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    # a row without any key shows them all, so that its weights are finite
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~(seen | ~seen.any(-1, keepdim=True)), -torch.inf
    )


SDPA: Kernel[PatternCall] = Kernel(
    "sdpa",
    run_sdpa,
    (
        facts.window_holds_all,
        facts.fused_engine,
        facts.no_position_bias,
        facts.no_sink,
        facts.mask_is_small,
    ),
    "torch's fused scaled_dot_product_attention on every key: O(L²) time, O(L) memory",
    (facts.shows_all,),
)
