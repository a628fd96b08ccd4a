"""One query a row: what a step of decoding runs. All keys that it sees at once, in one fused call, without tiles.

It serves any pattern and any layout: the definition gives the bias of one row, O(S). Where a band is asked of a state
that holds consecutive tokens, the keys that it sees are the last ones: they are read alone, and need no bias.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.ledger import Ledger
from attention_zoo.layout.reach import Anywhere, Band
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.first import turned_bias
from attention_zoo.ops.softmax.dense import dense


def _run(call: PatternCall) -> Tensor:
    if call.pattern.reach.weights == "uniform" and not call.has_position_bias:
        # the reach is all there is to know: layers that reach alike share the bias
        key = ("row", call.pattern.reach, call.pattern.causal, id(call.queries))
        last, bias, _ = call.keys.plan(key, lambda: (*_seen(call), call.queries))
        if last is not None:
            k, v = (x.narrow(2, x.shape[2] - last, last) for x in (call.k, call.v))
            return attend_to(call.q, k, v, None, call.scale, call.sink)
    else:
        bias = _bias(call)
    if call.turned is not None:
        assert bias is not None
        bias = bias + turned_bias(call)
    return _blanked(call, attend_to(call.q, call.k, call.v, bias, call.scale, call.sink))


def _seen(call: PatternCall) -> tuple[int | None, Tensor | None]:
    """How many of the last keys are all that every row sees, without a mask; or None, and the bias of all keys."""
    reach, held = call.pattern.reach, call.columns
    near = isinstance(reach, Band) and reach.contiguous and reach.same_for_all
    if (near or isinstance(reach, Anywhere)) and held is not None and in_order(held.ledger):
        last = held.filled if reach.farthest is None else min(held.filled, reach.farthest + 1)
        # valid tokens are the last of each row: the first of these says it of all
        whole = bool(held.ledger.host.valid[:, held.filled - last].all())
        if whole and not listed_globals(held.ledger).columns.shape[1]:
            return last, None
    return None, _bias(call)


def _bias(call: PatternCall) -> Tensor:
    """[B|1, H|1, 1, S]. Padding sees nothing, but what the kernel makes of it must be finite."""
    bias = call.pattern.full_bias(call.queries, call.keys)
    return bias if call.queries.dense else bias.masked_fill(~call.queries.valid[:, None, :, None], 0)


def _blanked(call: PatternCall, out: Tensor) -> Tensor:
    return out if call.queries.dense else out.masked_fill_(~call.queries.valid[:, None, :, None], 0)


ROW: Kernel[PatternCall] = Kernel(
    "row",
    _run,
    (facts.one_query, facts.no_gradients, facts.every_row, facts.exact_turned),
    "one query: every key held, in one fused call; no gradients",
)


def attend_to(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, sink: Float[Tensor, " H"] | None
) -> Float[Tensor, "B H 1 D"]:
    """One query of each head on all of these keys; query heads that share a key head become rows of one query."""
    B, H, _, D = q.shape
    groups = H // k.shape[1]
    q = q.reshape(B, k.shape[1], groups, D)
    if bias is not None:
        if groups > 1:
            bias = bias.expand(-1, H, -1, -1).reshape(len(bias), k.shape[1], groups, -1)
        bias = bias.to(q.dtype).expand(B, -1, -1, -1)
    if sink is not None:
        return dense(q, k, v, bias, scale=scale, sink=sink.view(-1, groups)).reshape(B, H, 1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).reshape(B, H, 1, D)


# --- what a state's columns are --------------------------------------------------------------------------------------


def in_order(ledger: Ledger) -> bool:
    """Whether each row's valid columns are its last, consecutive tokens of one document."""
    # fields of its own: what was concatenated is not known to be in order
    return ledger.own and ledger.steady


class Listed(NamedTuple):
    """The global tokens that are held.

    Fields:
        filled: columns that were looked at.
        columns: of the tokens, the latest first; -1 where a row has fewer.
    """

    filled: int
    columns: Int[np.ndarray, "B g"]


def listed_globals(ledger: Ledger) -> Listed:
    """Found again where some came; else with the same columns, as one object."""
    fields, filled = ledger.fields, ledger.filled
    known: Listed | None = fields.__dict__.get("_listed")
    if known is not None and known.filled <= filled:
        new = ledger.host.cut(slice(known.filled, filled))
        if not bool((new.is_global & new.valid).any()):
            fields.__dict__["_listed"] = known = known._replace(filled=filled)
            return known
    host = ledger.host
    mask = host.is_global & host.valid
    most = int(mask.sum(1).max(initial=0))
    column = -np.sort(-np.where(mask, np.arange(filled), -1), axis=1)[:, :most]
    fields.__dict__["_listed"] = known = Listed(filled, column)
    return known
