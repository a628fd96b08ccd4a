"""Hashed attention of few short documents: weights are kept for backward.

As in ops/lsh/short.py all pairs of a document's tokens are scored, each weighted by how often it is shown. Of few pairs
operators are what costs, and what is computed again: up to `CELLS` weights are held instead, so that memory stays
linear, and all documents and heads run at once. Causal queries go in parts, which leave out what is future for all of
their rows.

Letters as in ops/lsh/short.py; N = K · H. Of a part: l rows, which see the first s columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attention_zoo.ops.lsh.chunks import _keys
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.lsh.shown import ROWS, ShortLayout, Windows
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

CELLS = 1 << 21
"""Most pairs, over documents and heads, of which causally about a half are kept: 8 MiB in float32 where all are."""


def is_kept(plan: HashedPlan, laid: ShortLayout, heads: int) -> bool:
    """Whether there are few pairs, and all tokens are asked for."""
    return plan.asked is None and laid.documents * heads * laid.keys.columns**2 <= CELLS


def kept_attention(
    q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan, laid: ShortLayout
) -> Float[Tensor, "M H D"]:
    """See `short_attention`, where `is_kept`."""
    out: Tensor = _Kept.apply(q, v, plan, laid)
    return out


class _Kept(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, v: Tensor, plan: HashedPlan, laid: ShortLayout) -> Tensor:
        k, factor = _keys(q, plan.epsilon)
        windows, (H, D) = Windows(plan, laid, q.shape[1]), q.shape[1:]
        query, key, value = (_heads(laid, x.to(k.dtype)) for x in (q, k, v))
        out = k.new_empty(laid.documents, laid.keys.columns, H, D)
        nobody, weights = [], []
        for rows, columns in _parts(plan.causal, laid.keys.columns):
            bias, place = windows.all_heads(rows, columns)
            alone = bias.amax(-1, keepdim=True) == -torch.inf
            scores = bias.baddbmm_(query[:, rows], key[:, columns].transpose(1, 2), alpha=plan.scale)
            found = torch.softmax(scores, -1, out=place).masked_fill_(alone, 0)
            out[:, rows] = _apart(laid, torch.bmm(found, value[:, columns]))
            nobody.append(_apart(laid, alone))
            weights.append(found)
        alone = laid.keys.back(torch.cat(nobody, 1))
        made = torch.where(alone, v, laid.keys.back(out).to(v.dtype))
        ctx.save_for_backward(query, key, value, k, factor, made, alone, *weights)
        ctx.plan, ctx.laid, ctx.dtypes = plan._replace(buckets=None, order=None), laid, (q.dtype, v.dtype)
        return made

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (query, key, value, k, factor, made, alone, *weights), plan, laid = saved, ctx.plan, ctx.laid
        grad = grad.to(k.dtype)
        dout = _heads(laid, grad)
        delta = _heads(laid, (grad * made).sum(-1, keepdim=True))
        dq = torch.empty_like(query)
        dk: Any = None
        dv: Any = None
        # the widest first, to whose first columns the others are added
        for (rows, columns), found in reversed(list(zip(_parts(plan.causal, laid.keys.columns), weights, strict=True))):
            given = dout[:, rows]
            dv = _grown(dv, torch.bmm(found.transpose(1, 2), given))
            dscores = torch.baddbmm(delta[:, rows], given, value[:, columns].transpose(1, 2), beta=-1).mul_(found)
            dq[:, rows] = torch.bmm(dscores, key[:, columns])
            dk = _grown(dk, torch.bmm(dscores.transpose(1, 2), query[:, rows]))
        dq, dk, dv = (laid.keys.back(_apart(laid, x)) for x in (dq, dk, dv))
        # k = factor · q: what is along k goes nowhere
        dk = torch.addcmul(dk, k, (k * dk).sum(-1, keepdim=True), value=-1).mul_(factor).add_(dq).mul_(plan.scale)
        dv = dv + grad.masked_fill(~alone, 0)
        return dk.to(ctx.dtypes[0]), dv.to(ctx.dtypes[1]), None, None


def _parts(causal: bool, columns: int) -> list[tuple[slice, slice]]:
    """Rows of the documents, and the columns that they may see."""
    count = -(-columns // ROWS) if causal else 1
    borders = [columns * part // count for part in range(count + 1)]
    return [(slice(a, b), slice(0, b if causal else columns)) for a, b in pairwise(borders)]


def _grown(into: Float[Tensor, "N n D"] | None, more: Float[Tensor, "N s D"]) -> Float[Tensor, "N n D"]:
    if into is None:
        return more
    into[:, : more.shape[1]] += more
    return into


def _heads(laid: ShortLayout, x: Float[Tensor, "M H d"]) -> Float[Tensor, "N n d"]:
    return laid.keys.lay(x).transpose(1, 2).flatten(0, 1)


def _apart(laid: ShortLayout, x: Float[Tensor, "N n d"] | Bool[Tensor, "N n d"]) -> Tensor:
    """[K, n, H, d]."""
    return x.unflatten(0, (laid.documents, -1)).transpose(1, 2)
