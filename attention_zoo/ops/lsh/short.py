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
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, array_of, tensor_of
from attention_zoo.ops.lsh.chunks import HashedPlan, _keys, in_blocks, scores_at_once
from attention_zoo.ops.lsh.layout import ChunkLayout
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

    def take(self, x: Float[Tensor, "M h d"], documents: slice) -> Float[Tensor, "kh n d"]:
        found = x.unflatten(0, (-1, self.columns))[documents] if self.rows is None else x[self.rows[documents]]
        return found.transpose(1, 2).flatten(0, 1)

    def spread(self, numbers: Int[np.ndarray, " M"]) -> Int[np.ndarray, "K n"]:
        """These numbers, one for each row of the list, in the grid's places; -1 elsewhere."""
        if self.there is None:
            return numbers.reshape(-1, self.columns)
        assert self.rows is not None
        found = np.full(self.rows.numel(), -1)
        found[array_of(self.there)] = numbers
        return found.reshape(-1, self.columns)

    def back(self, x: Float[Tensor, "h K n d"]) -> Float[Tensor, "h M d"]:
        flat = x.flatten(1, 2)
        return flat if self.there is None else flat.index_select(1, self.there)


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
    return in_blocks(q, v, plan if laid.shown is None else plan.sorted(), partial(ShortBlock, laid))


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


class ShortBlock:
    """All pairs of the documents' tokens, for a few heads; see `HeadBlock`, whose place it takes."""

    def __init__(self, laid: ShortLayout, plan: HashedPlan, heads: slice):
        self.laid, self.plan, self.heads = laid, plan, heads
        self.in_chunk: Tensor | None = None  # C, [M, h, c]
        if laid.shown is not None and plan.order is not None:
            order = plan.order[heads].long()
            chunk = torch.empty_like(order).scatter_(2, order, laid.chunk.expand_as(order))
            shape = order.shape[2], len(order), laid.shown.shape[-1]
            self.in_chunk = laid.shown.new_zeros(shape).scatter_(2, chunk.permute(2, 0, 1), 1)

    def steps(self, h: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """A few documents at a time: which, and some queries after the others with the keys that they may see."""
        laid = self.laid
        m, n = laid.queries.columns, laid.keys.columns
        rows = ROWS if self.plan.causal and self.plan.asked is None else m
        parts = [(slice(a, min(a + rows, m)), slice(0, min(a + rows, n) if rows < m else n)) for a in range(0, m, rows)]
        size = max(1, scores_at_once(laid.bias.device) // (h * min(rows, m) * n))
        for start in range(0, laid.documents, size):
            yield slice(start, min(start + size, laid.documents)), parts

    def bias(self, documents: slice, h: int, rows: slice, columns: slice) -> Float[Tensor, "_ _ l s"]:
        laid = self.laid
        bias = (laid.bias if len(laid.bias) == 1 else laid.bias[documents])[:, :, rows, columns]
        if laid.shown is None or self.in_chunk is None:
            return bias
        keys = laid.keys.take(self.in_chunk, documents)
        queries = keys
        if self.plan.asked is not None:
            queries = laid.queries.take(self.in_chunk[self.plan.asked], documents)
        shown = laid.shown if len(laid.shown) == 1 else laid.shown[documents]
        windows = queries[:, rows].unflatten(0, (-1, h)) @ shown
        met = torch.bmm(windows.flatten(0, 1), keys[:, columns].transpose(1, 2)).unflatten(0, (-1, h))
        return (met.clamp_(max=1) if self.plan.once else met).log_().add_(bias)

    def forward(self, q: Tensor, v: Tensor) -> tuple[Float[Tensor, "h m D"], Float[Tensor, "h m"]]:
        """As of `HeadBlock`."""
        laid, (_, h, D) = self.laid, q.shape
        k, _ = _keys(q, self.plan.epsilon)
        asked = q if self.plan.asked is None else q[self.plan.asked]
        out = k.new_empty(h, laid.documents, laid.queries.columns, D)
        lse = k.new_empty(h, laid.documents, laid.queries.columns, 1)
        scratch = Scratch()
        for documents, parts in self.steps(h):
            queries, keys, values = laid.queries.take(asked, documents), *self.keys(k, v, documents)
            for rows, columns in parts:
                query = queries[:, rows]
                sums = Sums(query.unflatten(0, (-1, h)), scratch)
                bias, shape = self.bias(documents, h, rows, columns), (len(query) // h, h, query.shape[1])
                sums.add(query, keys[:, columns], values[:, columns], bias, scale=self.plan.scale, shape=shape)
                found, found_lse = sums.end()
                out[:, documents, rows] = found.transpose(0, 1)
                lse[:, documents, rows] = found_lse.transpose(0, 1)
        return laid.queries.back(out), laid.queries.back(lse)[..., 0]

    def backward(
        self, q: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Float[Tensor, "h M D"], Float[Tensor, "h M D"]]:
        """As of `HeadBlock`."""
        laid, (_, h, D) = self.laid, q.shape
        k, factor = _keys(q, self.plan.epsilon)
        asked = slice(None) if self.plan.asked is None else self.plan.asked
        delta = -(grad.to(k.dtype) * out).sum(-1, keepdim=True)
        shift = (lse.masked_fill(lse == -torch.inf, torch.inf) * -LOG2E)[..., None]  # +inf: weights are exactly zero
        rows_of, keys_of = (h, laid.documents, laid.queries.columns, D), (h, laid.documents, laid.keys.columns, D)
        dq, dk, dv = k.new_zeros(rows_of), k.new_zeros(keys_of), k.new_zeros(keys_of)
        scratch = Scratch()
        for documents, parts in self.steps(h):
            mine = Asked(*(laid.queries.take(x, documents) for x in (grad, q[asked], delta, shift)))
            keys, values = self.keys(k, v, documents)
            into = [scratch(name, x.shape, k).zero_() for name, x in (("dq", mine.q), ("dk", keys), ("dv", values))]
            for rows, columns in parts:
                some = Asked(*(x[:, rows] for x in mine))
                partial_backward(
                    some,
                    keys[:, columns],
                    values[:, columns],
                    self.bias(documents, h, rows, columns),
                    scale=self.plan.scale,
                    into=(into[0][:, rows], into[1][:, columns], into[2][:, columns]),
                    shape=(len(keys) // h, h, some.q.shape[1]),
                    scratch=scratch,
                )
            for whole, part in zip((dq, dk, dv), into):
                whole[:, documents] = part.unflatten(0, (-1, h)).transpose(0, 1)
        dk, dv = laid.keys.back(dk), laid.keys.back(dv)
        k, factor = k.transpose(0, 1), factor.transpose(0, 1)
        total = dk.sub_(k * (k * dk).sum(-1, keepdim=True)).mul_(factor)
        total[:, asked] += laid.queries.back(dq)
        return total, dv

    def keys(self, k: Tensor, v: Tensor, documents: slice) -> tuple[Float[Tensor, "kh n D"], Float[Tensor, "kh n D"]]:
        return self.laid.keys.take(k, documents), self.laid.keys.take(v, documents)
