"""Hashed attention of short documents: all pairs of tokens, weighted by how often the windows of all rounds show them.

A softmax over the rounds' keys, where a key met n times counts n times, is one over all keys with log n added to their
scores. In a document of few chunks that is less work than gathering its windows: with C the one-hot matrix of tokens
and the chunks of all rounds, S of how often the window of a chunk shows another, n = C S Cᵀ, a product of few columns.
Where every window holds the whole document, n is the same for all pairs: hashes do not matter, and nothing is sorted.

O(n²) time for documents of n tokens, O(M·D) memory: pairs are computed again in backward, a few documents at a time.
Letters as in ops/lsh/chunks.py; K documents of n tokens at most, m of which are asked for, in c chunks over all rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, array_of, tensor_of
from attention_zoo.ops.lsh.chunks import HashedPlan, _keys, scores_at_once
from attention_zoo.ops.lsh.layout import ChunkLayout
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, partial_backward

ROWS = 128
"""Queries at once of a causal document: keys that are future for all of them are left out."""


class Grid(NamedTuple):
    """Rows of a ragged list, document by document.

    Fields:
        rows: [K, n], which they are; any where a document has fewer. None: n each, in the order of the list.
        there: flat places of the grid that hold one, in the order of the list; None: all.
        columns: n.
    """

    rows: Int[Tensor, "K n"] | None
    there: Int[Tensor, " M"] | None
    columns: int

    @staticmethod
    def of(document: Int[np.ndarray, " M"], documents: int, device: torch.device) -> Grid:
        """Rows of these documents, whose numbers are in order and below `documents`."""
        sizes = np.bincount(document, minlength=documents)
        columns = int(sizes.max())
        if bool((sizes == columns).all()):
            return Grid(None, None, columns)
        number = np.arange(len(document))
        there = document * columns + number - (sizes.cumsum() - sizes)[document]
        rows = np.zeros(documents * columns, np.int64)
        rows[there] = number
        return Grid(tensor_of(rows.reshape(documents, columns), device), tensor_of(there, device), columns)

    def lay(self, x: Float[Tensor, "M h d"]) -> Float[Tensor, "K n h d"]:
        """A view where no document is shorter than another."""
        return x.unflatten(0, (-1, self.columns)) if self.rows is None else x[self.rows]

    def spread(self, numbers: Int[np.ndarray, " M"]) -> Int[np.ndarray, "K n"]:
        """These numbers, one for each row of the list, in the grid's places; -1 elsewhere."""
        if self.there is None:
            return numbers.reshape(-1, self.columns)
        assert self.rows is not None
        found = np.full(self.rows.numel(), -1)
        found[array_of(self.there)] = numbers
        return found.reshape(-1, self.columns)

    def back(self, x: Float[Tensor, "K n h d"]) -> Float[Tensor, "M h d"]:
        flat = x.flatten(0, 1)
        return flat if self.there is None else flat.index_select(0, self.there)


class ShortLayout(NamedTuple):
    """Documents side by side.

    Fields:
        documents: K.
        keys, queries: where the tokens are, and those that are asked for.
        bias: [K|1, 1, m, n], -inf for what a query never sees: itself, causally the future, and what is no token.
        chunk: [R, M], of the i-th token in sorted order in each round, its chunk among the c of its document.
        shown: [K|1, 1, c, c], how often a chunk's window shows another; None: all pairs alike.
    """

    documents: int
    keys: Grid
    queries: Grid
    bias: Float[Tensor, "_ 1 m n"]
    chunk: Int[Tensor, "R M"]
    shown: Float[Tensor, "_ 1 c c"] | None


def short_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan) -> Float[Tensor, "m H D"]:
    """See `lsh_attention`; buckets are not told apart."""
    laid = lay_short(plan, torch.promote_types(q.dtype, torch.float32))
    out: Tensor = _Short.apply(q, v, plan if laid.shown is None else plan.sorted(), laid)
    return out


def lay_short(plan: HashedPlan, dtype: torch.dtype) -> ShortLayout:
    """Of a plan's documents, with biases in this dtype."""
    document, device = array_of(plan.layout.document), plan.layout.document.device
    K, every = int(document[-1]) + 1, np.arange(len(document))
    asked = every if plan.asked is None else array_of(plan.asked)
    keys = Grid.of(document, K, device)
    queries = keys if plan.asked is None else Grid.of(document[asked], K, device)
    key, query = keys.spread(every)[:, None], queries.spread(asked)[:, :, None]
    seen = (key < query if plan.causal else key != query) & (key >= 0) & (query >= 0)
    seen = seen[:1] if bool((seen == seen[:1]).all()) else seen
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(tensor_of(~seen, device), -torch.inf)
    chunk, shown = _shown(plan.layout, document)
    weights = None if shown is None else tensor_of(shown[:, None], device).to(dtype)
    return ShortLayout(K, keys, queries, bias[:, None], tensor_of(chunk, device), weights)


def _shown(layout: ChunkLayout, document: Int[np.ndarray, " M"]) -> tuple[Array, Array | None]:
    """`ShortLayout.chunk` and `shown`."""
    R, at = layout.rounds, array_of(layout.slot) // layout.chunk
    first = at[np.searchsorted(document, np.arange(document[-1] + 1))]  # chunk of each document
    number = np.arange(len(layout.neighbours))
    round_, inside = np.divmod(number, len(number) // R)
    owner = np.searchsorted(first, inside, side="right") - 1
    n = int(np.bincount(owner).max()) // R
    local = round_ * n + inside - first[owner]
    shown = np.zeros((len(first), R * n, R * n))
    places = owner[:, None], local[:, None], local[array_of(layout.neighbours)]
    np.add.at(shown, places, array_of(layout.present))
    chunk = np.arange(R)[:, None] * n + at - first[document]
    there = np.zeros((len(first), R * n), bool)
    there[owner, local] = True
    blocks = shown.reshape(-1, R, n, R, n)
    alike = (blocks == blocks[:, :, :1, :, :1]).reshape(shown.shape)
    if bool((alike | ~there[:, :, None] | ~there[:, None]).all()):
        return chunk, None
    return chunk, (shown[:1] if bool((shown == shown[:1]).all()) else shown)


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

    def __init__(self, plan: HashedPlan, laid: ShortLayout, heads: int):
        self.plan, self.laid, self.H = plan, laid, heads
        if laid.shown is None or plan.order is None:
            return
        order = plan.order.long()
        chunk = torch.empty_like(order).scatter_(2, order, laid.chunk.expand_as(order))
        shape = order.shape[2], heads, laid.shown.shape[-1]
        chosen = laid.shown.new_zeros(shape).scatter_(2, chunk.permute(2, 0, 1), 1)
        self.keys = laid.keys.lay(chosen)
        queries = self.keys if plan.asked is None else laid.queries.lay(chosen[plan.asked])
        self.windows = (queries.flatten(1, 2) @ laid.shown[:, 0]).view(queries.shape)

    def __iter__(self) -> Iterator[_Step]:
        laid, H = self.laid, self.H
        K, m, n = laid.documents, laid.queries.columns, laid.keys.columns
        # the fewer, the better: each is some operations on views
        together = min(K, max(1, scores_at_once(laid.bias.device) // (min(m, ROWS) * n))) if K >= H else 1
        heads = [slice(head, head + 1) for head in range(H)] if K >= H else [slice(0, H)]
        halves = self.plan.causal and self.plan.asked is None
        for start in range(0, K, together):
            for some in heads:
                for row in range(0, m, ROWS):
                    rows = slice(row, min(row + ROWS, m))
                    columns = slice(0, rows.stop if halves else n)
                    yield _Step(slice(start, min(start + together, K)), some, rows, columns)

    def bias(self, step: _Step) -> Float[Tensor, "_ _ l s"]:
        bias = self.laid.bias if len(self.laid.bias) == 1 else self.laid.bias[step.documents]
        bias = bias[:, :, step.rows, step.columns]
        if self.laid.shown is None:
            return bias
        met = torch.bmm(step.of(self.windows, step.rows), step.of(self.keys, step.columns).transpose(1, 2))
        # by arithmetic: the logarithm of 0 takes five times as long as another
        found = met.clamp(max=1).sub_(1).mul_(torch.finfo(met.dtype).max).mul_(2)  # -inf where it is hidden, else 0
        if not self.plan.once:
            found.add_(met.clamp_(min=1).log_())
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
        alone = lse[..., 0] == -torch.inf
        out[alone] = v[asked][alone]
        ctx.save_for_backward(q, v, out, lse)
        ctx.plan, ctx.laid = plan._replace(buckets=None), laid
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
        pairs, scratch = _Pairs(plan, laid, q.shape[1]), Scratch()
        for step in pairs:
            mine = Asked(*(step.of(x, step.rows) for x in rows))
            key, value = step.of(keys, step.columns), step.of(values, step.columns)
            # products into what is no block of memory go one by one
            share = [scratch(name, x.shape, k) for name, x in (("dq", mine.q), ("dk", key), ("dv", value))]
            share[0].zero_()
            bias, shape = pairs.bias(step), pairs.shape(step, mine.q)[:3]
            partial_backward(
                mine,
                key,
                value,
                bias,
                scale=plan.scale,
                into=(share[0], share[1], share[2]),
                shape=shape,
                scratch=scratch,
                fresh=True,
            )
            step.of(dq, step.rows).copy_(share[0])
            for total, part in ((dk, share[1]), (dv, share[2])):
                step.of(total, step.columns).add_(part)
        dq, dk, dv = laid.queries.back(dq), laid.keys.back(dk), laid.keys.back(dv)
        dk.sub_(k * (k * dk).sum(-1, keepdim=True)).mul_(factor)
        dk[asked] += dq
        token, head, _ = alone.nonzero(as_tuple=True)
        at = token if plan.asked is None else plan.asked[token]
        dv.index_put_((at, head), grad[token, head].to(dv.dtype), accumulate=True)
        return dk.to(q.dtype), dv.to(v.dtype), None, None
