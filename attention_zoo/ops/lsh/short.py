"""Hashed attention of short documents: all pairs of tokens, weighted by how often the windows of all rounds show them.

A softmax over the rounds' keys, where a key met n times counts n times, is one over all keys with log n added to their
scores. In a short document that is less work than gathering its windows: see shown.py. Where every window holds the
whole document and buckets are not told apart, n is the same for all pairs: hashes do not matter, and nothing is sorted.

O(n²) time for documents of n tokens, O(M·D) memory: pairs are computed again in backward, a few documents at a time.
Letters as in ops/lsh/chunks.py; K documents of n tokens at most, m of which are asked for, in c chunks over all rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.lsh.arcs import order_is_idle
from attention_zoo.ops.lsh.chunks import _keys, scores_at_once
from attention_zoo.ops.lsh.kept import is_kept, kept_attention
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.lsh.shown import ROWS, ShortLayout, Windows, is_alike, lay_short
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, partial_backward


def short_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan) -> Float[Tensor, "m H D"]:
    """See `lsh_attention`; buckets are told apart where a plan `has_arcs`."""
    laid = lay_short(plan, torch.promote_types(q.dtype, torch.float32))
    plan = plan if is_alike(plan, laid) or order_is_idle(plan) else plan.sorted()
    if is_kept(plan, laid, q.shape[1]):
        return kept_attention(q, v, plan, laid)
    out: Tensor = _Short.apply(q, v, plan, laid)
    return out


class _Step(NamedTuple):
    """One head of some documents, or all heads of one; queries, and the keys that they may see."""

    documents: slice
    heads: slice
    rows: slice
    columns: slice

    def of(self, x: Float[Tensor, "K n H d"], places: slice) -> Float[Tensor, "N l d"]:
        """A view, whose batches are documents or heads."""
        some = x[self.documents, places, self.heads]
        return some[:, :, 0] if some.shape[2] == 1 else some[0].transpose(0, 1)


class _Pairs:
    """The steps of a call, and their biases."""

    def __init__(self, plan: HashedPlan, laid: ShortLayout, heads: int, windows: Windows | None = None):
        self.plan, self.laid, self.H = plan, laid, heads
        self.windows = windows or Windows(plan, laid, heads)

    def __iter__(self) -> Iterator[_Step]:
        laid, H = self.laid, self.H
        K, m, n = laid.documents, laid.queries.columns, laid.keys.columns
        # the fewer, the better: each is some operations on views
        together = min(K, max(1, scores_at_once(laid.device) // (min(m, ROWS) * n))) if K >= H else 1
        heads = [slice(head, head + 1) for head in range(H)] if K >= H else [slice(0, H)]
        halves = self.plan.causal and self.plan.asked is None
        for start in range(0, K, together):
            for some in heads:
                for row in range(0, m, ROWS):
                    rows = slice(row, min(row + ROWS, m))
                    columns = slice(0, rows.stop if halves else n)
                    yield _Step(slice(start, min(start + together, K)), some, rows, columns)

    def bias(self, step: _Step) -> Float[Tensor, "_ _ l s"]:
        bias = self.laid.hidden(step.documents, step.rows, step.columns)
        if self.windows.alike:
            return bias
        found = self.windows.logarithm(self.windows.met(step.documents, step.heads, step.rows, step.columns))
        return found.view(self.shape(step, found)).add_(bias)

    def shape(self, step: _Step, rows: Float[Tensor, "N l _"]) -> tuple[int, int, int, int]:
        """Batches as documents and heads."""
        K = len(range(self.laid.documents)[step.documents])
        return K, len(rows) // K, rows.shape[1], rows.shape[2]


class _Short(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, v: Tensor, plan: HashedPlan, laid: ShortLayout) -> Tensor:
        k, _ = _keys(q, plan.epsilon)
        asked = slice(None) if plan.asked is None else plan.asked
        queries, keys, values = laid.queries.lay(q[asked]), laid.keys.lay(k), laid.keys.lay(v)
        out, lse = large_pages(torch.empty_like(queries)), k.new_empty(*queries.shape[:3], 1)
        pairs, scratch = _Pairs(plan, laid, q.shape[1]), Scratch()
        for step in pairs:
            query = step.of(queries, step.rows)
            shape = pairs.shape(step, query)
            sums = Sums(query.view(shape), scratch)
            key, value = step.of(keys, step.columns), step.of(values, step.columns)
            sums.add(query, key, value, pairs.bias(step), scale=plan.scale, shape=shape[:3])
            found, found_lse = sums.end()
            step.of(out, step.rows).copy_(found.view(query.shape))
            step.of(lse, step.rows).copy_(found_lse.view(*query.shape[:2], 1))
        out, lse = laid.queries.back(out), laid.queries.back(lse)
        out = torch.where(lse == -torch.inf, v[asked], out)  # who sees nobody else
        ctx.save_for_backward(q, v, out, lse)
        ctx.windows = pairs.windows if pairs.windows.lasts else None
        ctx.plan, ctx.laid = plan._replace(buckets=None, order=None) if pairs.windows.lasts else plan, laid
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (q, v, out, lse), plan, laid = saved, ctx.plan, ctx.laid
        k, factor = _keys(q, plan.epsilon)
        asked = slice(None) if plan.asked is None else plan.asked
        delta = (grad * out).sum(-1, keepdim=True, dtype=k.dtype).neg_()
        alone = lse == -torch.inf
        shift = lse.masked_fill(alone, torch.inf).mul_(-LOG2E)  # +inf: weights are exactly zero
        rows = Asked(*(laid.queries.lay(x) for x in (grad, q[asked], delta, shift)))
        keys, values = laid.keys.lay(k), laid.keys.lay(v)
        dq = large_pages(torch.empty_like(rows.q, dtype=k.dtype))
        dk, dv = (large_pages(torch.empty_like(x, dtype=k.dtype)).zero_() for x in (keys, values))
        pairs, scratch = _Pairs(plan, laid, q.shape[1], ctx.windows), Scratch()
        for step in pairs:
            mine = Asked(*(step.of(x, step.rows) for x in rows))
            key, value = step.of(keys, step.columns), step.of(values, step.columns)
            # products into what is no block of memory go one by one
            share = scratch("dq", mine.q.shape, k), scratch("dk", key.shape, k), scratch("dv", value.shape, k)
            share[0].zero_()
            bias, shape = pairs.bias(step), pairs.shape(step, mine.q)[:3]
            partial_backward(
                mine, key, value, bias, scale=plan.scale, into=share, shape=shape, scratch=scratch, fresh=True
            )
            step.of(dq, step.rows).copy_(share[0])
            for total, part in ((dk, share[1]), (dv, share[2])):
                step.of(total, step.columns).add_(part)
        dq, dk, dv = laid.queries.back(dq), laid.keys.back(dk), laid.keys.back(dv)
        dk.sub_(k * (k * dk).sum(-1, keepdim=True)).mul_(factor)
        dk[asked] += dq
        dv[asked] += grad.masked_fill(~alone, 0).to(dv.dtype)
        return dk.to(q.dtype), dv.to(v.dtype), None, None
