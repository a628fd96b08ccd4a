"""Rows that see everything, of a sequence that several processes own: queries travel to the keys, not keys to them.

A few rows (global tokens, whole rows of blocks) are sent to all who own keys that they see. Each answers with the
softmax over its own keys and its log-sum-exp; the owner of a row merges the answers. O(rows · processes) bytes,
whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import meet
from attention_zoo.layout.placement import Placement
from attention_zoo.ops.exchange.columns import fetched
from attention_zoo.ops.exchange.route import Fetch, Route, back_again, fetching
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.partial import Scratch
from attention_zoo.ops.softmax.pieces import Piece, add_gradients, add_pieces

Pieces = Callable[[Tensor, Layout], list[tuple[slice, list[Piece]]]]
"""Of some queries, and what they are, on this process's own keys."""


class Everyone(NamedTuple):
    """Who asks whom.

    Fields:
        mine: which of this process's own columns ask, of any row of the batch.
        valid: [B, 1, n, 1], in which rows of the batch they do.
        fetch: the questions that come; the answers go back by `back`.
        asked: what the questions are: those that come, then the own ones.
        place: [n], where each answer that comes belongs, counted over [processes, own questions].
    """

    mine: Int[Tensor, " n"]
    valid: Bool[Tensor, "B 1 n 1"]
    fetch: Fetch
    back: Route
    asked: Layout
    place: Int[Tensor, " m"]


def everyone_of(placement: Placement, whole: Layout, seers: Bool[np.ndarray, "B L"], causal: bool) -> Everyone:
    """Of the rows `seers` of the whole sequence."""
    host, columns, me = whole.host, placement.columns, placement.rank
    wanted = [
        (meet(host, each, host.valid, after=False, causal=causal) & seers).any(0, keepdims=True) for each in columns
    ]
    device = whole.valid.device
    fetch = fetching(placement, wanted, device)
    mine = np.flatnonzero(seers[:, columns[me]].any(0))
    own = columns[me][mine]
    asked = Placement.chosen(whole.with_globals(seers), np.concatenate([fetch.columns, own]))
    flags = np.ascontiguousarray(seers[:, own])
    # answers come process after process, each in the order in which it was asked
    place = [
        rank * len(mine) + np.searchsorted(mine, some.numpy(force=True)) for rank, some in enumerate(fetch.route.sends)
    ]
    asked = Layout.known(asked.host.only(asked.host.is_global), device)
    return Everyone(
        tensor_of(mine, device),
        tensor_of(flags[:, None, :, None], device),
        fetch,
        back_again(fetch),
        asked,
        tensor_of(np.concatenate(place), device),
    )


def with_rows_of_everyone(
    out: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K L D"],
    v: Float[Tensor, "B K L D"],
    plan: Everyone,
    pieces: Pieces,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """The output of other rows, with those put in that see everything. Every process of the group must call it.

    Args:
        out: of all rows; what it holds in these is thrown away.
        q, k, v: of this process's own columns.
        pieces: see `Pieces`.
        sink: for each head the score of one more key, whose value is zero.
    """
    B, H, _, D = q.shape
    asking = q.index_select(2, plan.mine).transpose(1, 2).flatten(2)  # [B, n, H · D]
    came = fetched(q.transpose(1, 2).flatten(2), plan.fetch.route, "global queries")
    questions = torch.cat([came, asking], 1).unflatten(2, (H, D)).transpose(1, 2)
    answers, lse = _Answers.apply(questions, k, v, pieces(questions, plan.asked), scale)
    both = torch.cat([answers, lse], -1).transpose(1, 2).flatten(2)  # [B, m, H · (D + 1)]
    count = len(plan.mine)
    theirs, own = both.split([both.shape[1] - count, count], 1)
    size, me = plan.back.placement.size, plan.back.placement.rank
    returned = torch.cat([fetched(theirs, plan.back, "global answers"), own], 1)
    place = torch.cat([plan.place, torch.arange(me * count, (me + 1) * count, device=q.device)])
    nothing = torch.zeros(B, size * count, H, D + 1, dtype=both.dtype, device=q.device)
    nothing[..., -1] = -torch.inf
    found = nothing.index_copy(1, place, returned.unflatten(2, (H, D + 1))).unflatten(1, (size, count))
    rows = _merged(found, plan.valid, sink).to(out.dtype)
    old = out.index_select(2, plan.mine)
    return out.index_copy(2, plan.mine, torch.where(plan.valid, rows, old))


def _merged(
    found: Float[Tensor, "B N n H D1"], valid: Bool[Tensor, "B 1 n 1"], sink: Tensor | None
) -> Float[Tensor, "B H n D"]:
    """One softmax of the answers of N processes, and of a sink; zeros where nobody asked."""
    found = found.permute(0, 3, 2, 1, 4)  # [B, H, n, N, D + 1]
    values, lse = found[..., :-1], found[..., -1]
    lse = lse.masked_fill(~valid, 0)
    if sink is not None:
        values = torch.cat([values, torch.zeros_like(values[..., :1, :])], -2)
        lse = torch.cat([lse, sink.to(lse.dtype).view(1, -1, 1, 1).expand(*lse.shape[:3], 1)], -1)
    return (lse.softmax(-1)[..., None] * values).sum(-2)


class _Answers(torch.autograd.Function):
    """Softmax of questions over some keys, and its log-sum-exp, both with gradients."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Any, scale: float) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full((*q.shape[:3], 1), -torch.inf, dtype=exact, device=q.device)
        add_pieces(q, k, v, pieces, scale=scale, into=(out, lse), scratch=Scratch())
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = saved
        # the log-sum-exp's derivative by a score is that score's weight
        delta = dlse - (grad * out).sum(-1, keepdim=True)
        into = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v)]
        add_gradients(
            grad, q, k, v, delta, lse, ctx.pieces, scale=ctx.scale, into=(into[0], into[1], into[2]), scratch=Scratch()
        )
        return *(x.to(y.dtype) for x, y in zip(into, (q, k, v), strict=True)), None, None
