"""Rows whose scores are known to be small, so that their exponentials need no shift by the row's largest score.

By Cauchy and Schwarz no score is larger than scale · |q| · |k|, of either sign. The norms cost a hundredth of the
attention; they save a search and a subtraction over all its scores. Each row is judged by itself and by keys that it
may see, never by padding, the future or other documents: what cannot reach a row must not change its last bit either.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attention_zoo.layout.host import on_host
from attention_zoo.ops.pattern.call import PatternCall

MILD = 44.0
"""Largest score that is taken as it is: e^44 leaves float32 room for a million keys times values up to 10^13."""
_APART = float(1 << 20)  # how far apart the documents of a row are put; longer norms are no bound


def mild_rows(call: PatternCall, first: int | None) -> Bool[Tensor, "B H L 1"] | None:
    """Rows of all heads whose scores cannot exceed `MILD`, whatever they see; None: none is known to be such.

    Of rows that are no query nothing is said. On a CPU alone: elsewhere the host would wait for the answers.

    Args:
        first: the column of the first query, where queries stand in consecutive columns; None: not known. Positions
            rise over the valid columns of a document (`Tokens`), so that a causal query sees none beyond its column.
    """
    if first is None or call.has_position_bias or not on_host(call.q.device) or not call.q.numel():
        return None
    if call.pattern.reach.weights not in ("uniform", "counts"):
        return None  # its bias may be of any size
    longest = _longest_seen(call)[:, :, first : first + call.q.shape[2]]
    longest = longest.repeat_interleave(call.q.shape[1] // longest.shape[1], 1)
    return (_norms(call.q) * longest * call.scale <= MILD)[..., None]  # false for NaN


def _longest_seen(call: PatternCall) -> Float[Tensor, "B K S"]:
    """For the query of each column, a bound of the norms of all keys that it may see."""
    keys = call.keys
    found = _norms(call.k)
    if not call.all_valid:
        found = found.where(keys.valid[:, None], 0)
    if call.one_document:
        if call.pattern.causal:
            return found.cummax(-1).values
        return found.amax(-1, keepdim=True).expand_as(found)
    # one running maximum for all documents: a later one stands higher
    document = keys.document.where(keys.valid, 0).cummax(1).values
    # documents are counted within the row: ids may be any, and too large to add to
    number = (document.diff(dim=1) != 0).cumsum(1)
    floor = torch.nn.functional.pad(number, (1, 0))[:, None].double() * _APART
    found = found.double().clamp(max=_APART / 2)
    longest = (found + floor).cummax(-1).values - floor
    if not call.pattern.causal:
        longest = torch.maximum(longest, (found - floor).flip(-1).cummax(-1).values.flip(-1) + floor)
    return longest.masked_fill_(longest >= _APART / 2, torch.inf)  # that long, or longer


def _norms(x: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
