"""What kernels of patterns need to know of a call: each fact once, with the sentence that says why it does not hold."""

from __future__ import annotations

import numpy as np
import torch

from attention_zoo.layout.host import Host, on_host
from attention_zoo.layout.kernel import triton_reason
from attention_zoo.layout.reach import Anywhere, Band, Blocks
from attention_zoo.ops.pattern.call import Pattern, PatternCall
from attention_zoo.ops.pattern.heads import reach_by_head
from attention_zoo.ops.softmax import fused

MASK = 2**23
"""Most cells of a mask that fused attention is given on a CPU, 32 MiB in float32: for a segment behind its past."""
MASKED = {True: 512, False: 256}
"""Most queries for which a mask that hides half of the keys or more costs less than tiles, which leave those out: of
one document, and of several. At 1,024 tiles take two thirds of the time, at 2,048 half."""


# --- of a pattern ----------------------------------------------------------------------------------------------------


def is_band(pattern: Pattern) -> str | None:
    return "all see the first tokens besides" if pattern.reach.first else is_band_and_first(pattern)


def is_band_and_first(pattern: Pattern) -> str | None:
    """A band, beside which all may see the first tokens of their document."""
    reach = pattern.reach
    plain = isinstance(reach, Band) and (reach.same_for_all or reach_by_head(reach) is not None)
    if plain and reach.weights in ("uniform", "distance"):
        return None
    return "the pattern is no band: it depends on more than the distance"


def is_uniform(pattern: Pattern) -> str | None:
    return None if pattern.reach.weights == "uniform" else "the pattern weighs its keys"


def is_plain_band(pattern: Pattern) -> str | None:
    if is_band(pattern) or is_uniform(pattern):
        return "the pattern is no band"
    if not (isinstance(pattern.reach, Band) and pattern.reach.same_for_all):
        return "heads reach differently far"
    return None if pattern.reach.contiguous else "the band has gaps (dilation)"


def is_blocks(pattern: Pattern) -> str | None:
    return None if isinstance(pattern.reach, Blocks) else "the pattern is not made of blocks"


def is_one_function(pattern: Pattern) -> str | None:
    """Whether the bias of a pair can be computed on chip, from its two tokens, and the links of the one."""
    known = isinstance(pattern.reach, Band | Anywhere | Blocks)
    return None if known else "the pattern is no function of two positions alone"


def shows_all(pattern: Pattern) -> str | None:
    """Whether there are calls in which it hides nothing."""
    reach = pattern.reach
    if isinstance(reach, Anywhere) and reach.weights == "uniform":
        return None
    return is_plain_band(pattern) and "the pattern is no band without gaps"


# --- of a call -------------------------------------------------------------------------------------------------------


def one_query(call: PatternCall) -> str | None:
    return None if call.q.shape[2] == 1 else "more than one query"


def no_gradients(call: PatternCall) -> str | None:
    return "it is for decoding, without gradients" if torch.is_grad_enabled() else None


def every_row(call: PatternCall) -> str | None:
    return "global queries have projections of their own" if call.apart and call.queries.any_global else None


def causal(call: PatternCall) -> str | None:
    return None if call.pattern.causal else "links of a two-sided pattern depend on the whole length"


def on_cpu(call: PatternCall) -> str | None:
    device = call.q.device
    return None if on_host(device) else f"it runs on CPU, not on {device.type}"


def on_cuda(call: PatternCall) -> str | None:
    device = call.q.device.type
    return None if device == "cuda" else f"it runs on CUDA, not on {device}"


def has_triton(call: PatternCall) -> str | None:
    return triton_reason(call.q.device)


def fused_engine(call: PatternCall) -> str | None:
    return fused.refuse(call.q)


def exact_bias(call: PatternCall) -> str | None:
    dtype = call.q.dtype
    return None if dtype in (torch.float32, torch.float64) else f"{_name(dtype)} would round the bias"


def exact_position_bias(call: PatternCall) -> str | None:
    return exact_bias(call) if call.has_position_bias else None


def half_precision(call: PatternCall) -> str | None:
    dtype = call.q.dtype
    return None if dtype in fused.HALF else f"its windows exist in half precision, not in {_name(dtype)}"


def no_position_bias(call: PatternCall) -> str | None:
    return "the position scheme adds to the scores" if call.has_position_bias else None


def no_sink(call: PatternCall) -> str | None:
    return None if call.sink is None else "it gives no log-sum-exp, by which a learned sink takes its share"


def first_is_fixed(call: PatternCall) -> str | None:
    return "the bias of the first tokens learns" if call.learned and call.pattern.reach.first else None


def turned_is_fixed(call: PatternCall) -> str | None:
    return "the bias of the first tokens learns" if call.learned and call.turned is not None else None


def exact_turned(call: PatternCall) -> str | None:
    return None if call.turned is None else exact_bias(call)


def bias_is_fixed(call: PatternCall) -> str | None:
    return "the bias learns" if call.learned else None


def no_globals(call: PatternCall) -> str | None:
    return "it knows no global tokens" if call.any_global_key or call.queries.any_global else None


def queries_within_keys(call: PatternCall) -> str | None:
    L, S = call.lengths
    return None if 0 < L <= S else "there are no queries, or more than keys"


def own_keys(call: PatternCall) -> str | None:
    return None if call.own_keys else "queries are not the last tokens of the keys"


def consecutive(call: PatternCall) -> str | None:
    """Documents lie in consecutive columns, with nothing forgotten inside."""
    return None if call.aligned else "columns are not positions here (holes, or forgotten keys)"


def globals_alike(call: PatternCall) -> str | None:
    alike = call.queries.globals_alike and call.keys.globals_alike
    return None if alike else "batch rows differ in their global tokens"


def window_holds_all(call: PatternCall) -> str | None:
    reach = call.pattern.reach
    if not isinstance(reach, Band):
        return None
    if max(_last(each.host) for each in (call.queries, call.keys)) > reach.farthest:
        return "there are keys beyond the window"
    return None


def mask_is_small(call: PatternCall) -> str | None:
    """No mask of queries x keys is needed; or a small one on a CPU, that hides little or has few rows."""
    reason = unmasked(call)
    if reason is None:
        return None
    (L, S), rows = call.lengths, 1 if call.rows_alike else len(call.q)
    if on_cuda(call) is None or rows * L * S > MASK:
        return f"{reason}, and a mask of L x S would be too large"
    if MASKED[call.one_document] >= L or (call.one_document and 2 * L <= S):
        return None
    return f"{reason}, and tiles leave out what a mask would hide"


def unmasked(call: PatternCall) -> str | None:
    """Whether fused attention needs no mask of queries x keys."""
    if not call.one_document:
        return "rows hold several documents"
    if not call.pattern.causal:
        return None
    if reason := own_keys(call):
        return reason
    L, S = call.lengths
    if L == 1:
        return None
    if L != S:
        return "a causal mask with earlier keys is not square"
    return None if call.starts_at_zero else "a causal mask cannot hide padding on the left or in holes"


def _last(tokens: Host) -> int:
    """The last position of any document, at least 0."""
    return int(np.where(tokens.valid, tokens.position, 0).max(initial=0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
