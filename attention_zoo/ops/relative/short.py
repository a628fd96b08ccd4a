"""Relative attention of few queries to their own segment: all scores at once, and kept for backward.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V

Of short segments operators are what costs, and what chunks compute again in backward. Here the products with keys are
added to those with distances (brought to columns by `Shift`, without a copy), and a softmax's weights are kept: a third
of the operators of chunks.py. Up to `CELLS` numbers, so that memory stays linear.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.relative.chunks import ChunkPlan, Shift, falling, relative_attention
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.partial import Scratch

ROWS = 256
"""Most queries: of more, chunks leave out what is future."""
CELLS = 1 << 20
"""Most weights, over batch and heads: 4 MiB in float32."""


def is_short(q: Float[Tensor, "B H L D"], k: Float[Tensor, "B H S D"], plan: ChunkPlan) -> bool:
    """Whether there are few queries, and each sees all columns up to its own, which are of its own segment."""
    (B, H, L, _), S = q.shape, k.shape[2]
    if plan.triton is not None or plan.position is not None or L > ROWS or B * H * L * S > CELLS:
        return False
    return plan.distances == S and not plan.apart and all(chunk.clear == chunk.low == 0 for chunk in plan.chunks)


def short_or_chunked(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    k_own: Float[Tensor, "B H S D"],
    v_own: Float[Tensor, "B H S D"],
    r: Float[Tensor, "n H D"],
    u: Float[Tensor, "H D"],
    w: Float[Tensor, "H D"],
    plan: ChunkPlan,
    *,
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """`relative_attention`, by the faster of the two."""
    if is_short(q, k, plan):
        return _Short.apply(q, k, v, k_own, v_own, r, u, w, plan, scale)
    return relative_attention(q, k, v, k_own, v_own, r, u, w, plan, scale=scale)


class _Short(torch.autograd.Function):
    """Heads first, as in chunks.py; N = H · B."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: ChunkPlan, scale: float) -> Tensor:
        B, _, L, _ = q.shape
        exact, S = torch.promote_types(q.dtype, torch.float32), k.shape[2]
        query, table = q.to(exact).transpose(0, 1), falling(r, exact)
        product = torch.bmm((query + w[:, None, None]).flatten(1, 2), table.transpose(1, 2))
        scores = Shift(L, S).view(product, B).flatten(0, 1)
        keys = _heads(k, exact).transpose(1, 2)
        scores = torch.baddbmm(scores, (query + u[:, None, None]).flatten(0, 1), keys, beta=scale, alpha=scale)
        future = torch.ones(L, S, dtype=torch.bool, device=scores.device).triu_(1 + S - L)
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        ctx.save_for_backward(q, k, v, r, u, w, weights)
        ctx.scale = scale
        return _rows(torch.bmm(weights, _heads(v, exact)), q)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, weights = saved
        (B, H, L, _), S, exact = q.shape, k.shape[2], weights.dtype
        query, table, shape = q.to(exact).transpose(0, 1), falling(r, exact), Shift(L, S)
        to_keys, to_distances = (query + u[:, None, None]).flatten(0, 1), (query + w[:, None, None]).flatten(1, 2)
        keys, values, dout = (_heads(x, exact) for x in (k, v, grad))
        dv = _rows(torch.bmm(weights.transpose(1, 2), dout), v)
        dweights = torch.bmm(dout, values.transpose(1, 2))
        # torch's own of a softmax takes one pass; the scale goes in where the gradient is brought to distances
        dscores = torch._softmax_backward_data(dweights, weights, -1, exact).view(H, B, L, S)
        dscores, dproduct = shape.gradient(dscores, dscores.new_full((), ctx.scale), Scratch())
        dscores = dscores.flatten(0, 1)
        dk = _rows(torch.bmm(dscores.transpose(1, 2), to_keys), k)
        for_keys = torch.bmm(dscores, keys).view(query.shape)
        for_distances = torch.bmm(dproduct, table).view(query.shape)
        dtable = torch.bmm(dproduct.transpose(1, 2), to_distances)
        du, dw = (x.sum((1, 2)).to(u.dtype) for x in (for_keys, for_distances))
        dq = _rows(for_keys.add_(for_distances).flatten(0, 1), q)
        dr = dtable[:, :-1].flip(1).transpose(0, 1).to(r.dtype)
        # all pairs are of own segments: both streams get the same gradient
        own = (x if wanted else None for x, wanted in zip((dk, dv), ctx.needs_input_grad[3:5]))
        return dq, dk, dv, *own, dr, du, dw, None, None


def _heads(x: Float[Tensor, "B H n D"], dtype: torch.dtype) -> Float[Tensor, "N n D"]:
    return x.to(dtype).transpose(0, 1).flatten(0, 1)


def _rows(x: Float[Tensor, "N n D"], like: Float[Tensor, "B H n D"]) -> Float[Tensor, "B H n D"]:
    """In the dtype and the order of batch and heads of `like`, [B, n, H, D] in memory: as projections read it."""
    B, H, n, D = like.shape
    made = like.new_empty(B, n, H, D)
    made.permute(2, 0, 1, 3).copy_(x.view(H, B, n, D))
    return made.transpose(1, 2)
