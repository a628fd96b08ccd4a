"""The short kernel of a band: torch's fused attention on all keys, the band as its bias. For few keys on a CPU.

Where a window holds about half of the keys, or where there are few keys, going through tiles costs more than
multiplying by all of them: at 256 tokens, 8 heads of 64 and a window of 64 a side, 1.4 times. The bias depends on the
distance alone, so that it is computed once for each distance and spread. For backward L x S numbers are kept, one for
all batch rows, hence `KEYS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.softmax.fused import fused

KEYS = 1024
"""Most keys: bounds the bias."""
TILES = 4
"""So many tiles of keys are always few: 256."""


def _is_few(call: PatternCall) -> str | None:
    S, pattern = call.k.shape[2], call.pattern
    window = call.band.farthest // max(call.band.strides)
    # causal tiles leave out the future, which a bias does not
    most = min(KEYS, max(TILES * pattern.tile, 0 if pattern.causal else 2 * window + pattern.tile))
    return None if most >= S else f"{S} keys are no short call at this window (at most {most})"


def _run(call: PatternCall) -> Tensor:
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    return fused(q, k, v, _bias(call).to(q.dtype), scale=call.scale)


def _bias(call: PatternCall) -> Tensor:
    """[1, H|1, L, S]. A query sees itself, so something."""
    if call.any_global_key or call.any_global_query:
        first = slice(0, 1)  # batch rows are alike
        return call.pattern.full_bias(call.queries.cut(slice(None), first), call.keys.cut(slice(None), first))
    L, S = call.q.shape[2], call.k.shape[2]
    keys = Layout.plain(1, L + S - 1, call.q.device)
    query = keys.cut(slice(S - 1, S))
    bias = call.pattern.scores_bias(query, keys)  # of one query and keys S - 1 before it to L - 1 after it
    if call.pattern.causal:
        bias = bias.masked_fill(keys.position > query.position, -torch.inf)
    return bias[:, :, 0].unfold(-1, S, 1).flip(2)  # the first query is the farthest from the last key


SHORT_BAND: Kernel[PatternCall] = Kernel(
    "short",
    _run,
    (
        facts.on_cpu,
        facts.no_sink,
        _is_few,
        facts.queries_within_keys,
        facts.bias_is_fixed,
        facts.exact_position_bias,
        facts.from_zero,
        facts.no_padding,
        facts.globals_alike,
    ),
    f"up to {KEYS} keys: torch's fused attention on all of them, a bias",
    (facts.is_band,),
)
