"""The short kernel of a band: torch's fused attention on all keys, the band as its bias. For few keys on a CPU.

Where a window holds about half of the keys, or where there are few keys, going through tiles costs more than
multiplying by all of them: at 256 tokens, 8 heads of 64 and a window of 64 a side, 1.4 times. The bias depends on the
distance alone, so that it is computed once for each distance and spread. For backward L x S numbers are kept, one for
all batch rows, hence `KEYS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.ops import fused
from attention_zoo.ops.dispatch import Kernel
from attention_zoo.ops.pattern_call import PatternCall
from attention_zoo.ops.plans import with_global_rows

KEYS = 1024
"""Most keys: bounds the bias."""
TILES = 4
"""So many tiles of keys are always few: 256."""


def _refuse(call: PatternCall) -> str | None:
    (_, _, L, _), S, pattern = call.q.shape, call.k.shape[2], call.pattern
    if call.q.device.type != "cpu":
        return f"it runs on CPU, not on {call.q.device.type}"
    if not pattern.shift_invariant or pattern.reach is None:
        return "the pattern is no band: it depends on more than the distance"
    window = pattern.reach // max(pattern.strides)
    # causal tiles leave out the future, which a bias does not
    most = min(KEYS, max(TILES * pattern.tile, 0 if pattern.causal else 2 * window + pattern.tile))
    if most < S:
        return f"{S} keys are no short call at this window (at most {most})"
    if not 0 < L <= S:
        return "there are no queries, or more than keys"
    if call.learned:
        return "the bias learns"
    if call.has_position_bias and call.q.dtype not in (torch.float32, torch.float64):
        return f"{str(call.q.dtype).removeprefix('torch.')} would round the bias"
    if not call.starts_at_zero or not call.all_valid:
        return "columns are not positions here (padding, holes, documents or forgotten keys)"
    flags = (tokens.is_global for tokens in (call.queries, call.keys))
    if any(bool((some != some[:1]).any()) for some in flags):
        return "batch rows differ in their global tokens"
    return None


def _run(call: PatternCall) -> Tensor:
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    out = fused.fused(q, k, v, _bias(call).to(q.dtype), scale=call.scale)
    return out if call.global_qkv is None else with_global_rows(call, out)


def _bias(call: PatternCall) -> Tensor:
    """[1, H|1, L, S]. A query sees itself, so something."""
    if call.any_global_key or call.any_global_query:
        first = slice(0, 1)  # batch rows are alike
        return call.pattern.full_bias(call.queries.cut(slice(None), first), call.keys.cut(slice(None), first))
    L, S = call.q.shape[2], call.k.shape[2]
    keys = Tokens.all_valid(1, L + S - 1, call.q.device)
    query = keys.cut(slice(S - 1, S))
    bias = call.pattern.scores_bias(query, keys)  # of one query and keys S - 1 before it to L - 1 after it
    if call.pattern.causal:
        bias = bias.masked_fill(keys.position > query.position, -torch.inf)
    return bias[:, :, 0].unfold(-1, S, 1).flip(2)  # the first query is the farthest from the last key


SHORT_BAND = Kernel("short", _run, _refuse, f"up to {KEYS} keys: torch's fused attention on all of them, a bias")
