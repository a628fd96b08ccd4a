"""The short kernel of a band: torch's fused attention on all keys, the band as its bias. For few keys on a CPU.

Where a window holds about half of the keys, or where there are few keys, going through tiles costs more than
multiplying by all of them: at 256 tokens, 8 heads of 64 and a window of 64 a side, 1.4 times. The bias depends on the
distance alone, so that it is computed once for each distance and spread; with padding, holes or documents it is the
definition of each batch row. For backward L x S numbers are kept, for each row that differs, hence `KEYS` and `CELLS`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import global_columns
from attention_zoo.ops.softmax.fused import fused

KEYS = 1024
"""Most keys: bounds the bias."""
TILES = 4
"""So many tiles of keys are always few: 256."""
CELLS = 1 << 24
"""Most numbers of the bias where batch rows differ: 64 MiB in float32."""


def _is_few(call: PatternCall) -> str | None:
    S, pattern = call.k.shape[2], call.pattern
    window = call.band.farthest // max(call.band.strides)
    # causal tiles leave out the future, which a bias does not
    most = min(KEYS, max(TILES * pattern.tile, 0 if pattern.causal else 2 * window + pattern.tile))
    if not _is_even(call):
        most = min(most, TILES * pattern.tile)  # tiles leave out other documents, too
        rows = 1 if _rows_alike(call) else len(call.q)
        if rows * call.q.shape[1] * call.q.shape[2] * S > CELLS:
            return f"batch rows differ, and their biases would be too large (at most {CELLS} numbers)"
    return None if most >= S else f"{S} keys are no short call at this window (at most {most})"


def _is_even(call: PatternCall) -> bool:
    """Whether columns are positions, and all batch rows are alike."""
    return call.starts_at_zero and call.all_valid and facts.globals_alike(call) is None


def _rows_alike(call: PatternCall) -> bool:
    return call.rows_alike and facts.globals_alike(call) is None


def _run(call: PatternCall) -> Tensor:
    # the fused call wants channels side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    # padding may see nothing, for which torch gives zeros
    return call.blank(fused(q, k, v, _bias(call).to(q.dtype), scale=call.scale))


def _bias(call: PatternCall) -> Tensor:
    """[B|1, H|1, L, S]. A query sees itself, so something."""
    some_global = call.any_global_key or call.any_global_query
    if not _is_even(call) or (some_global and call.has_position_bias):
        rows = slice(0, 1 if _rows_alike(call) else None)
        return call.pattern.full_bias(call.queries.cut(slice(None), rows), call.keys.cut(slice(None), rows))
    L, S = call.q.shape[2], call.k.shape[2]
    keys = Layout.plain(1, L + S - 1, call.q.device)
    query = keys.cut(slice(S - 1, S))
    bias = call.pattern.scores_bias(query, keys)  # of one query and keys S - 1 before it to L - 1 after it
    if call.pattern.causal:
        bias = bias.masked_fill(keys.position > query.position, -torch.inf)
    bias = bias[:, :, 0].unfold(-1, S, 1).flip(2)  # the first query is the farthest from the last key
    return _with_globals(call, bias) if some_global else bias


def _with_globals(call: PatternCall, bias: Float[Tensor, "1 #H L S"]) -> Float[Tensor, "1 #H L S"]:
    """The same, in place, where global tokens, which are those of all batch rows, see and are seen by everyone."""
    L, S = bias.shape[2:]
    for axis, layout in ((2, call.queries), (3, call.keys)):
        if layout.any_global:
            bias.index_fill_(axis, global_columns(layout)[0][0], 0)
    if call.pattern.causal:
        bias.masked_fill_(torch.ones(L, S, dtype=torch.bool, device=bias.device).triu_(1 + S - L), -torch.inf)
    return bias


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
    ),
    f"up to {KEYS} keys: torch's fused attention on all of them, a bias",
    (facts.is_band,),
)
