"""Relative attention segment by segment, each over keys gathered for it: memories, summaries of memories, its own.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{c(i) - c(j)}]) V        c: columns of the segment's own table of keys

A piece is some consecutive queries of one segment and the keys that they see, brought side by side in the order in
which they count, the last query's own key in the last column. So a distance is a difference of columns, whatever the
keys are, and is brought there by a view (`Shift`). Pieces that are alike run together; of long ones, some queries after
others, each lot over the columns up to its last query's own.

Gradients of keys go to two streams, as in chunks.py: those of all pairs, and those of the last `own` columns alone,
which lie inside the segment. Scores are computed again in backward, whole rows at once: O(L · keys) time, O(L · D)
memory, of which nothing but the inputs, the output and its log-sum-exp is saved. Between two products there are as few
passes over the scores as can be: one product is added to where the other is, what rows bring stands there first.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.relative.operands import RelativeOperands, gradients_of
from attention_zoo.ops.relative.segment_tiles import PiecePlan, Table, Work, multiply, tiles
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOWEST


def segment_attention(
    given: RelativeOperands, plan: PiecePlan, *, scale: float, slots: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "B L H D"]:
    """What each query attends to under the plan; zeros where a row is no query.

    Args:
        given: q of [B, L, H, D], keys and values of [B, T, H, D], distances up to plan.distances - 1 or more.
        scale: factor on both terms.
        slots: keys and values [B, G, H, D] that stand before the others in the table; None: they are among them.
    """
    return _Segments.apply(*given, plan, scale, *(slots or (None, None)))


class _Segments(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: PiecePlan, scale: float, slots_k, slots_v) -> Tensor:
        work = Work(r, u, w, scale, q.dtype)
        out = _buffer(q, q.dtype, zero=not plan.whole, spare=1)
        lse = work.table.new_empty(*out.shape[:2], 1)  # base 2
        tables = ("keys", Table(k, slots_k)), ("values", Table(v, slots_v))
        for tile in tiles(plan, q):
            asked = work.sides(tile.rows_of(q))
            keys, values = (tile.keys_of(table, name, work) for name, table in tables)
            found, total = work.like(asked[0], "found"), work.like(asked[0], "total", 1)
            for part in tile.parts:
                weights = work.exponents(part, asked, part.seen(keys), None)
                peak = weights.amax(-1, keepdim=True).clamp_(min=LOWEST)
                weights.sub_(peak).exp2_()
                into, sums = part.asked(found), part.asked(total)
                torch.sum(weights, -1, keepdim=True, out=sums)
                multiply(into, weights, part.seen(values), beta=0)
                into.div_(sums)
                sums.log2_().add_(peak)
            tile.put(out, found)
            tile.put(lse, total)
        out = out[:-1]
        ctx.save_for_backward(q, k, v, slots_k, slots_v, r, u, w, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out.view(q.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slots_k, slots_v, r, u, w, out, lse = saved
        plan, scale, work = ctx.plan, ctx.scale, Work(r, u, w, ctx.scale, q.dtype)
        table, exact, tables = work.table, work.table.dtype, (Table(k, slots_k), Table(v, slots_v))
        grad, out = grad if len(grad) == 1 else grad.contiguous(), out.view(q.shape)
        dtable, du, dw = torch.zeros_like(table), *(torch.zeros_like(x, dtype=exact) for x in (u, w))
        dq = _buffer(q, exact, zero=not plan.whole, spare=1)
        wanted, spare = (True, True, *ctx.needs_input_grad[3:5]), tables[0].front * len(k)
        streams: list[Any] = [_buffer(k, exact, zero=True, spare=spare) if want else None for want in wanted]
        for tile in tiles(plan, q):
            asked = to_keys, to_distances = work.sides(tile.rows_of(q))
            keys, values = (tile.keys_of(each, name, work) for name, each in zip(("keys", "values"), tables))
            dkeys, dvalues = (work.like(keys, name) for name in ("dkeys", "dvalues"))
            dout, result = (work.copied(tile.rows_of(x), name) for x, name in ((grad, "dout"), (out, "found")))
            delta = result.mul_(dout).sum(-1, keepdim=True).neg_()
            for_keys = result  # which is not needed any more
            for_distances, shift = work.like(to_distances, "for_distances"), tile.shift(lse, work)
            for part in tile.parts:
                mine, grads, beta = part.seen(keys), part.asked(dout), 0 if part.covers_all else 1
                weights = work.exponents(part, asked, mine, part.asked(shift)).exp2_()
                multiply(part.seen(dvalues), weights.mT, grads, beta=beta)
                dweights = work.like(weights, "dweights").copy_(part.asked(delta))
                dscores = weights.mul_(multiply(dweights, grads, part.seen(values).mT))
                multiply(part.seen(dkeys), dscores.mT, part.asked(to_keys), beta=beta)
                multiply(part.asked(for_keys), dscores, mine, beta=0, alpha=scale)
                dproduct = part.rest_cleared(work.product(part))
                multiply(part.asked(for_distances), dproduct, part.distances(table), beta=0, alpha=scale)
                multiply(part.distances(dtable), dproduct.mT, part.asked(to_distances))
            du += for_keys.view_as(for_distances).sum(1)
            dw += for_distances.sum(1)
            tile.put(dq, for_keys.add_(for_distances.view_as(for_keys)))
            tile.add(streams[0], streams[2], dkeys)
            tile.add(streams[1], streams[3], dvalues)
        (dk, dslots_k), (dv, dslots_v), *own = (tables[0].apart(each) for each in streams)
        found = gradients_of((q, k, v, r, u, w), (dk, dv, *(each for each, _ in own)), dtable, dq[:-1], du, dw)
        return *found, None, None, dslots_k, dslots_v


def _buffer(
    like: Float[Tensor, "B L H D"], dtype: torch.dtype, zero: bool, spare: int = 0
) -> Float[Tensor, "BL_and_spare H D"]:
    made = large_pages(like.new_empty(like.shape[0] * like.shape[1] + spare, *like.shape[2:], dtype=dtype))
    return made.zero_() if zero else made
