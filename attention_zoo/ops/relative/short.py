"""Relative attention of few queries to their own segment: weights are kept for backward.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V

Of short segments operators are what costs, and what chunks compute again in backward. Here the products with keys are
added to those with distances (brought to columns by `Shift`, without a copy), and a softmax's weights are kept: a third
of the operators of chunks.py. Up to `CELLS` numbers, so that memory stays linear. Queries go in parts, which leave out
what is future for all of their rows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.relative.chunks import ROWS, ChunkPlan, Shift, falling, relative_attention
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

CELLS = 1 << 21
"""Most pairs, over batch and heads, of which about a half are kept: 8 MiB in float32 where all are."""


def is_short(q: Float[Tensor, "B H L D"], k: Float[Tensor, "B H S D"], plan: ChunkPlan) -> bool:
    """Whether there are few queries, and each sees all columns up to its own, which are of its own segment."""
    (B, H, L, _), S = q.shape, k.shape[2]
    if plan.triton is not None or plan.position is not None or B * H * L * S > CELLS:
        return False
    return plan.distances == S and not plan.apart and all(chunk.clear == chunk.low == 0 for chunk in plan.chunks)


def short_or_chunked(given: RelativeOperands, plan: ChunkPlan, *, scale: float) -> Float[Tensor, "B H L D"]:
    """`relative_attention`, by the faster of the two."""
    if is_short(given.q, given.k, plan):
        return short(given._replace(r=falling(given.r, given.r.dtype)), scale=scale)
    return relative_attention(given, plan, scale=scale)


def short(given: RelativeOperands, *, scale: float) -> Float[Tensor, "B H L D"]:
    """What the last L columns see of all up to their own, where `is_short`.

    Args:
        given: whose `r` is a table [H, S + 1, D] of distances, `falling`; the last row is spare and gets no gradient
            that means anything but zero.
    """
    return _Short.apply(*given, scale)


class _Short(torch.autograd.Function):
    """Heads first, as in chunks.py; N = H · B. Of a part: l rows, which see the first s columns."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, table, u, w, scale: float) -> Tensor:
        (B, H, L, D), given = q.shape, (q, k, v, table, u, w)
        exact, S = torch.promote_types(q.dtype, torch.float32), k.shape[2]
        query, table = q.to(exact).transpose(0, 1), table.to(exact)
        to_keys, to_distances = (query + bias.to(exact)[:, None, None] for bias in (u, w))
        keys, values = _heads(k, exact), _heads(v, exact)
        made, weights = q.new_empty(B, L, H, D), []
        by_head = made.permute(2, 0, 1, 3)
        for start, stop in _parts(L):
            rows, l, s = slice(start, stop), stop - start, S - L + stop
            shape = Shift(l, s)
            product = torch.bmm(_some(to_distances, rows).flatten(1, 2), shape.cut(table).transpose(1, 2))
            scores = torch.add(_future(l, s, exact, q.device), shape.view(product, B), alpha=scale).flatten(0, 1)
            scores.baddbmm_(_some(to_keys, rows).flatten(0, 1), keys[:, :s].transpose(1, 2), alpha=scale)
            # where the product was
            found = torch.softmax(scores, -1, out=product.view(-1)[: scores.numel()].view(scores.shape))
            by_head[:, :, rows] = torch.bmm(found, values[:, :s]).view(H, B, l, D)
            weights.append(found)
        ctx.save_for_backward(to_keys, to_distances, keys, values, table, made, *weights)
        ctx.scale, ctx.dtypes = scale, [x.dtype for x in given]
        return made.transpose(1, 2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        to_keys, to_distances, keys, values, table, made, *weights = saved
        (H, B, L, D), exact = to_keys.shape, to_keys.dtype
        dout = grad.to(exact).transpose(0, 1)
        # with the scale in it, gradients of scores need no pass for theirs
        scaled = dout * ctx.scale
        delta = (scaled * made.permute(2, 0, 1, 3)).sum(-1, keepdim=True)
        dq = made.new_empty(B, L, H, D)
        dk: Any = None
        dv: Any = None
        dtable, sums = None, []
        for (start, stop), found in reversed(list(zip(_parts(L), weights))):
            rows, (_, l, s) = slice(start, stop), found.shape
            shape = Shift(l, s)
            asked, of_keys = _some(dout, rows).flatten(0, 1), _some(to_keys, rows).flatten(0, 1)
            of_distances, distances = _some(to_distances, rows).flatten(1, 2), shape.cut(table)
            dv = _grown(dv, found.transpose(1, 2), asked)
            dscores = torch.baddbmm(
                _some(delta, rows).flatten(0, 1),
                _some(scaled, rows).flatten(0, 1),
                values[:, :s].transpose(1, 2),
                beta=-1,
            )
            dproduct = dscores.new_empty(H, B * l, s + 1)
            dscores = shape.into(dproduct, dscores.view(H, B, l, s), found.view(H, B, l, s)).flatten(0, 1)
            dk = _grown(dk, dscores.transpose(1, 2), of_keys)
            for_keys = torch.bmm(dscores, keys[:, :s]).view(H, B * l, D)
            for_distances = torch.bmm(dproduct, distances)
            dtable = _grown(dtable, dproduct.transpose(1, 2), of_distances, last=True)
            sums.append((for_keys.sum(1), for_distances.sum(1)))
            dq.permute(2, 0, 1, 3)[:, :, rows] = for_keys.add_(for_distances).view(H, B, l, D)
        du, dw = (sum(each[1:], each[0]) for each in zip(*sums))
        gradients = dq.transpose(1, 2), _rows(dk, B), _rows(dv, B), dtable, du, dw
        dq, dk, dv, dtable, du, dw = (each.to(dtype) for each, dtype in zip(gradients, ctx.dtypes))
        # all pairs are of own segments: both streams get the same gradient
        own = (x if wanted else None for x, wanted in zip((dk, dv), ctx.needs_input_grad[3:5]))
        return dq, dk, dv, *own, dtable, du, dw, None


def _parts(length: int) -> list[tuple[int, int]]:
    """Of all queries, as few alike as there are with at most `ROWS`."""
    count = -(-length // ROWS)
    borders = [length * part // count for part in range(count + 1)]
    return list(pairwise(borders))


@lru_cache(maxsize=8)
def _future(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "l s"]:
    """-inf where the last so many of the columns, as queries, do not see yet. Do not modify."""
    with torch.inference_mode(False):
        return torch.full((rows, columns), -torch.inf, dtype=dtype, device=device).triu_(1 + columns - rows)


def _some(x: Float[Tensor, "H B L d"], rows: slice) -> Float[Tensor, "H B l d"]:
    return x if rows == slice(0, x.shape[2]) else x[:, :, rows]


def _grown(
    into: Float[Tensor, "N n D"] | None,
    left: Float[Tensor, "N m l"],
    right: Float[Tensor, "N l D"],
    last: bool = False,
) -> Float[Tensor, "N n D"]:
    """The first, widest product, to whose first rows (`last`: its last ones) the others are added."""
    if into is None:
        return torch.bmm(left, right)
    n, m = into.shape[1], left.shape[1]
    (into[:, n - m :] if last else into[:, :m]).baddbmm_(left, right)
    return into


def _heads(x: Float[Tensor, "B H n D"], dtype: torch.dtype) -> Float[Tensor, "N n D"]:
    return x.to(dtype).transpose(0, 1).flatten(0, 1)


def _rows(x: Float[Tensor, "N n D"], B: int) -> Float[Tensor, "B H n D"]:
    """[B, n, H, D] in memory: as projections read it."""
    return x.view(-1, B, *x.shape[1:]).permute(1, 2, 0, 3).contiguous().transpose(1, 2)
