"""Short documents side by side, and how often the windows of all rounds show each token to each other.

With C the one-hot matrix of tokens and the chunks of all rounds, S of how often the window of a chunk shows another,
n = C S Cᵀ, a product of few columns; where there are many, or buckets are told apart, n is counted by comparing
(ops/lsh/arcs.py). Letters as in ops/lsh/short.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor

from attention_zoo.layout.host import Array, array_of, tensor_of
from attention_zoo.ops.lsh.arcs import Arcs, arcs_of, each, has_arcs, times_met
from attention_zoo.ops.lsh.layout import ChunkLayout
from attention_zoo.ops.lsh.plan import HashedPlan

ROWS = 128
"""Queries at once of a causal document: keys that are future for all of them are left out."""

COUNTED = 1 << 23
"""Most pairs, over documents and heads, that are counted at once and kept, a byte each."""

MASKED = 1 << 20
"""Most pairs whose biases are kept with a layout."""


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
    def of(document: Integer[np.ndarray, " M"], documents: int, device: torch.device) -> Grid:
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

    def spread(self, numbers: Integer[np.ndarray, " M"]) -> Integer[np.ndarray, "K n"]:
        """These numbers, one for each row of the list, in the grid's places; -1 elsewhere."""
        if self.there is None:
            return numbers.reshape(-1, self.columns)
        assert self.rows is not None
        found = np.full(self.rows.numel(), -1)
        found[array_of(self.there)] = numbers
        return found.reshape(-1, self.columns)

    def spread_last(self, x: Integer[np.ndarray, "*more M"]) -> Integer[np.ndarray, "*more K n"]:
        """The same of the last axis, and anything elsewhere."""
        return x.reshape(*x.shape[:-1], -1, self.columns) if self.rows is None else x[..., array_of(self.rows)]

    def back(self, x: Shaped[Tensor, "K n h d"]) -> Shaped[Tensor, "M h d"]:
        flat = x.flatten(0, 1)
        return flat if self.there is None else flat.index_select(0, self.there)


class ShortLayout(NamedTuple):
    """Documents side by side.

    Fields:
        documents: K.
        keys, queries: where the tokens are, and those that are asked for.
        key, query: numbers of the tokens in the list, [K|1, 1, n] and [K|1, m, 1]; -1 for what is no token.
        causal, dtype: of biases.
        bias: of all pairs, where these are few; see `hidden`.
        chunk: [R, M], of the i-th token in sorted order in each round, its chunk among the c of its document.
        chunks: c, over all rounds.
        shown: [K|1, s, s], how often a chunk's window shows another: of all rounds (s = c), or of each of them where no
            window reaches into another round; None: all pairs alike.
    """

    documents: int
    keys: Grid
    queries: Grid
    key: Integer[np.ndarray, "_ 1 n"]
    query: Integer[np.ndarray, "_ m 1"]
    causal: bool
    dtype: torch.dtype
    bias: Float[Tensor, "_ 1 m n"] | None
    chunk: Int[Tensor, "R M"]
    chunks: int
    shown: Float[Tensor, "_ s s"] | None

    @property
    def device(self) -> torch.device:
        return self.chunk.device

    def hidden(self, documents: slice, rows: slice, columns: slice) -> Float[Tensor, "_ 1 l s"]:
        """-inf for what a query never sees: itself, causally the future, and what is no token. Not to be written to."""
        documents = documents if len(self.key) > 1 else slice(None)
        if self.bias is not None:
            return self.bias[documents, :, rows, columns]
        return _bias(self.key[documents, :, columns], self.query[documents, rows], self.causal, self.dtype, self.device)


def _bias(
    key: Integer[np.ndarray, "_ 1 s"],
    query: Integer[np.ndarray, "_ l 1"],
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "_ 1 l s"]:
    seen = (key < query if causal else key != query) & (key >= 0) & (query >= 0)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(tensor_of(~seen, device), -torch.inf)[
        :, None
    ]


def lay_short(plan: HashedPlan, dtype: torch.dtype) -> ShortLayout:
    """Of a plan's documents, with biases in this dtype; kept with the layout where all tokens are asked for."""
    if plan.asked is not None:
        return _lay(plan, dtype)
    key = "short", plan.causal, dtype
    if key not in plan.layout.kept:
        with torch.inference_mode(False):  # it may outlive the call
            plan.layout.kept[key] = _lay(plan, dtype)
    found: ShortLayout = plan.layout.kept[key]
    return found


def _lay(plan: HashedPlan, dtype: torch.dtype) -> ShortLayout:
    document, device = array_of(plan.layout.document), plan.layout.document.device
    K, every = int(document[-1]) + 1, np.arange(len(document))
    asked = every if plan.asked is None else array_of(plan.asked)
    keys = Grid.of(document, K, device)
    queries = keys if plan.asked is None else Grid.of(document[asked], K, device)
    key, query = keys.spread(every)[:, None], queries.spread(asked)[:, :, None]
    if keys is queries and keys.rows is None:  # then all documents see alike
        key, query = key[:1], query[:1]
    few = max(len(key), len(query)) * key.shape[2] * query.shape[1] <= MASKED
    bias = _bias(key, query, plan.causal, dtype, device) if few else None
    chunk, chunks, shown = _shown(plan.layout, document)
    weights = None if shown is None else tensor_of(shown, device).to(dtype)
    return ShortLayout(
        K, keys, queries, key, query, plan.causal, dtype, bias, tensor_of(chunk, device), chunks, weights
    )


def _shown(layout: ChunkLayout, document: Integer[np.ndarray, " M"]) -> tuple[Array, int, Array | None]:
    """`ShortLayout.chunk`, `chunks` and `shown`."""
    at = array_of(layout.slot) // layout.chunk
    first = at[np.searchsorted(document, np.arange(document[-1] + 1))]  # chunk of each document
    total = len(layout.neighbours) // layout.rounds
    R = layout.rounds if layout.across_rounds else 1  # where rounds keep to themselves all are as the first
    number = np.arange(R * total)
    round_, inside = np.divmod(number, total)
    owner = np.searchsorted(first, inside, side="right") - 1
    n = int(np.bincount(owner).max()) // R
    local = round_ * n + inside - first[owner]
    shown = np.zeros((len(first), R * n, R * n))
    places = owner[:, None], local[:, None], local[array_of(layout.neighbours)[number]]
    np.add.at(shown, places, array_of(layout.present)[number])
    chunk, chunks = np.arange(layout.rounds)[:, None] * n + at - first[document], layout.rounds * n
    there = np.zeros((len(first), R * n), bool)
    there[owner, local] = True
    blocks = shown.reshape(-1, R, n, R, n)
    alike = (blocks == blocks[:, :, :1, :, :1]).reshape(shown.shape)
    if bool((alike | ~there[:, :, None] | ~there[:, None]).all()):
        return chunk, chunks, None
    return chunk, chunks, (shown[:1] if bool((shown == shown[:1]).all()) else shown)


class Windows:
    """How often the windows of all rounds show tokens of a grid to each other.

    Attributes:
        alike: whether all pairs are shown alike, so that nobody need ask.
        lasts: whether it is small and dear to make, so that backward should have it, too.
    """

    def __init__(self, plan: HashedPlan, laid: ShortLayout, heads: int):
        self.laid, self.once, self.heads = laid, plan.once, heads
        self.alike = is_alike(plan, laid)
        self.arcs: Arcs | None = None
        self.lasts = False
        self.counts: Integer[np.ndarray, "K H m n"] | None = None
        if self.alike:
            return
        if plan.inside or (has_arcs(plan) and not few_columns(laid.chunks, plan.layout.rounds)):
            self._by_arcs(plan)
        else:
            self._by_products(plan)

    def _by_arcs(self, plan: HashedPlan) -> None:
        """Cells of the keys, and arcs of the queries, [R, H, K, n|m]."""
        cell, seen = arcs_of(plan)
        asked = slice(None) if plan.asked is None else array_of(plan.asked)
        keys, queries = self.laid.keys, self.laid.queries
        spread = each(seen, lambda x: queries.spread_last(x[..., asked]))
        self.arcs, self.lasts = Arcs(keys.spread_last(cell), spread), True
        self.halves = plan.causal and plan.asked is None
        if self.laid.documents * self.heads * queries.columns * keys.columns <= COUNTED:
            every = slice(None)
            shape = self.laid.documents, self.heads, queries.columns, keys.columns
            self.counts = self._count(every, every, slice(0, queries.columns), every).reshape(shape)
            self.arcs = None

    def _by_products(self, plan: HashedPlan) -> None:
        """Of each token the chunks that it is in, [K, n, H, c], and those that its windows show, [K, m, H, c]."""
        laid, heads = self.laid, self.heads
        assert laid.shown is not None
        assert plan.order is not None
        order = plan.order.long()
        chunk = torch.empty_like(order).scatter_(2, order, laid.chunk.expand_as(order))
        if laid.keys.rows is None and plan.asked is None:
            # in memory as products of all heads take them
            places = chunk.unflatten(2, (-1, laid.keys.columns)).permute(2, 0, 3, 1)
            chosen = laid.shown.new_zeros(*places.shape[:3], laid.chunks).scatter_(3, places, 1)
            self.keys, self.queries = chosen.transpose(1, 2), self._shown_by(chosen).transpose(1, 2)
            return
        chosen = laid.shown.new_zeros(order.shape[2], heads, laid.chunks).scatter_(2, chunk.permute(2, 0, 1), 1)
        self.keys = laid.keys.lay(chosen)
        self.queries = self._shown_by(self.keys if plan.asked is None else laid.queries.lay(chosen[plan.asked]))

    def _shown_by(self, chosen: Float[Tensor, "K _ _ c"]) -> Float[Tensor, "K _ _ c"]:
        """What the windows of these chunks show."""
        shown = self.laid.shown
        assert shown is not None
        alike = chosen.reshape(len(chosen) if len(shown) > 1 else 1, -1, shown.shape[-1])
        return torch.bmm(alike, shown).view(chosen.shape)

    def met(self, documents: slice, heads: slice, rows: slice, columns: slice) -> Float[Tensor, "N l s"]:
        """Of these pairs, fresh; N documents and heads."""
        if self.counts is not None:
            found = self.counts[documents, heads, rows, columns]
        elif self.arcs is not None:
            found = self._count(documents, heads, rows, columns)
        else:
            queries, keys = self.queries[documents, rows, heads], self.keys[documents, columns, heads]
            pairs = queries.transpose(1, 2), keys.permute(0, 2, 3, 1)
            # batches of one document, or of one head, are views
            return torch.bmm(*(x[:, 0] if x.shape[1] == 1 else x.flatten(0, 1) for x in pairs))
        dtype = self.laid.dtype
        return (
            tensor_of(found, self.laid.device)
            .to(dtype, memory_format=torch.contiguous_format)
            .view(-1, *found.shape[-2:])
        )

    def _count(self, documents: slice, heads: slice, rows: slice, columns: slice) -> Integer[np.ndarray, "N l s"]:
        assert self.arcs is not None

        def some(x: Array, places: slice) -> Integer[np.ndarray, "R N _"]:
            chosen = x[:, heads, documents, places].swapaxes(1, 2)
            return chosen.reshape(len(x), -1, chosen.shape[3])

        seen = each(self.arcs.seen, lambda x: some(x, rows))
        stops = np.arange(*rows.indices(self.laid.queries.columns)) if self.halves else None
        return times_met(some(self.arcs.cell, columns), seen, stops)

    def logarithm(self, met: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
        """Of how often pairs are shown, fresh: -inf where never; `once`, 0 where ever."""
        if self.once:
            return torch.threshold(met, 0.5, -torch.inf).clamp_(max=0)
        # the logarithm of 0 takes five times as long as another
        return torch.threshold_(met.clamp(min=0.5).log_(), -0.5, -torch.inf)

    def all_heads(self, rows: slice, columns: slice) -> tuple[Float[Tensor, "N l s"], Float[Tensor, "N l s"]]:
        """The bias of these pairs of all documents and heads, N = K · H, and a place for as many numbers; fresh."""
        bias = self.laid.hidden(slice(None), rows, columns)
        if self.alike:
            bias = bias.expand(self.laid.documents, self.heads, -1, -1).flatten(0, 1).clone()
            return bias, torch.empty_like(bias)
        met = self.met(slice(None), slice(None), rows, columns)
        found = self.logarithm(met)
        found.unflatten(0, (self.laid.documents, -1)).add_(bias)
        return found, met


def is_alike(plan: HashedPlan, laid: ShortLayout) -> bool:
    """Whether all pairs are shown alike."""
    return laid.shown is None and not plan.inside


def few_columns(chunks: int, rounds: int) -> bool:
    """Whether products that count pairs, a column for each chunk of all rounds, cost less than comparing them does."""
    return chunks <= 5 * rounds + 50
