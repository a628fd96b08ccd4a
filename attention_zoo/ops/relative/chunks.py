"""Relative attention in chunks: softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V, linear in memory.

Dai et al. 2019 (Transformer-XL), §3.3. Queries go in chunks of about 128 rows and read only the key columns that one of
them sees, so time is O(L·reach) and memory O(L·D): neither L×L nor L×reach is ever stored, scores are recomputed in
backward from the log-sum-exp.

The distance term costs one product with the table r per chunk. Where keys stand in columns exactly as in positions it
is brought to key columns by a *view* ("shift"): with distances in falling order and one spare column, row i of the
product is needed i places further left, so reading the buffer with rows one element shorter is the shift. With holes
between the tokens the product is gathered by distance instead ("gather").

Keys and values come as two streams of the same numbers: gradients of pairs inside the query's own segment go to one
stream, those of all pairs to the other. `project_streams` makes them, so that weights learn from memory that hidden
states are shielded from, in one pass and without a loop over segments.

The backward is written by hand: autograd through slices of k in a loop would be quadratic. Tiles are float32 inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.relative.operands import RelativeOperands, gradients_of
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Scratch, add_product, partial

ROWS = 128
"""Queries per chunk, at most."""
TILE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Scores in work at once, about: a chunk goes in groups of heads. Small on a CPU, for the cache, large on CUDA."""


class Chunk(NamedTuple):
    """Some queries and the keys that any of them sees.

    Fields:
        start, stop: queries.
        low, high: key columns.
        clear: from this key column on only the future is hidden.
        own, all_own: before `own` no pair lies inside its query's own segment, from `all_own` on every pair does.
    """

    start: int
    stop: int
    low: int
    high: int
    clear: int
    own: int
    all_own: int


class ChunkPlan(NamedTuple):
    """Which keys each query sees, cut into chunks. Queries are the last columns of the keys. Made by `plan_chunks`.

    Fields:
        first: first key column that the query sees; it sees all valid ones from there to its own column. One more than
            its own column where it sees nothing.
        own: first key column of the query's own segment.
        chunks: in order, covering all queries.
        distances: how many distances, from 0 on, the table of distance keys must hold.
        position, valid: of the key columns, where these do not stand as positions do ("gather"); else None ("shift").
        triton: the `Starts` of ops/relative/triton.py, which then runs it ("triton") and needs no chunks; None: this
            file does.
    """

    first: Int[Tensor, "B L"]
    own: Int[Tensor, "B L"]
    chunks: tuple[Chunk, ...]
    distances: int
    position: Int[Tensor, "B S"] | None
    valid: Bool[Tensor, "B S"] | None
    triton: Any = None

    @property
    def apart(self) -> bool:
        """Whether some pair may lie in two segments; else both streams get the same gradient."""
        return self.triton is not None or any(chunk.all_own > chunk.low for chunk in self.chunks)


def chunk_borders(length: int, segment: int, phase: int) -> list[int]:
    """Cut queries into chunks of at most `ROWS`, on segment borders where it can, so that none reads a key in vain.

    Args:
        length: number of queries L.
        segment: length of a segment.
        phase: position of query 0, so that borders lie where phase + query is a multiple of `segment`.

    Returns:
        Ascending, from 0 to L.
    """
    parts = -(-segment // ROWS)
    step = segment * max(1, ROWS // segment)
    starts = range(-(phase % segment), length, step)
    inside = (start + step * part // parts for start in starts for part in range(parts))
    return [0, *(border for border in inside if 0 < border < length), length]


def plan_chunks(
    first: Int[np.ndarray, "B L"],
    own: Int[np.ndarray, "B L"],
    borders: Sequence[int],
    columns: int,
    *,
    keys: Layout | None = None,
    device: torch.device | str = "cpu",
) -> ChunkPlan:
    """Cut the queries at `borders` (ascending, from 0 to L) and find the keys that each chunk must read.

    Args:
        first, own: see `ChunkPlan`.
        columns: number of key columns S; query i stands in column S - L + i.
        keys: give them where columns do not stand as positions do.
    """
    B, L = first.shape
    offset = columns - L
    bounds = [found.tolist() for found in (first.min(0), first.max(0), own.min(0), own.max(0))]
    chunks = []
    for start, stop in pairwise(borders):
        first_low, first_high, own_low, own_high = (bound[start:stop] for bound in bounds)
        low, high = min(*first_low, offset + start), offset + stop
        inside = (min(max(column, low), high) for column in (max(first_high), min(own_low), max(own_high)))
        chunks.append(Chunk(start, stop, low, high, *inside))
    if keys is None:
        distances = max(chunk.high - chunk.low for chunk in chunks)
    else:
        position = keys.host.position
        oldest = np.take_along_axis(position, first.clip(max=columns - 1), 1)
        distances = int((position[:, offset:] - oldest).max().clip(min=0)) + 1
    if B > 1 and bool(((first == first[:1]) & (own == own[:1])).all()):
        first, own = first[:1], own[:1]  # all rows alike: one mask serves them
    where = (None, None) if keys is None else (keys.position, keys.valid)
    return ChunkPlan(tensor_of(first, device), tensor_of(own, device), tuple(chunks), distances, *where)


def relative_attention(given: RelativeOperands, plan: ChunkPlan, *, scale: float) -> Float[Tensor, "B H L D"]:
    """What each of the last L columns attends to under the plan; zeros where it sees nothing.

    Args:
        given: with keys of the distances 0, 1, ..., plan.distances - 1.
        scale: factor on both terms.
    """
    if plan.triton is not None:
        from attention_zoo.ops.relative import triton

        return triton.relative_attention(given, plan.triton, scale=scale)
    return _Relative.apply(*given, plan, scale)


class _Relative(torch.autograd.Function):
    """Tiles are [H, B, l, D]: heads first, so that the table of a head serves the rows of all sequences at once."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: ChunkPlan, scale: float) -> Tensor:
        B, H, L, _ = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        table = falling(r, exact)
        out = rows_first(q, L, q.dtype)
        lse = q.new_empty(B, H, L, dtype=exact)
        scratch = Scratch()
        for chunk, heads, shape in _tiles(plan, q):
            rows, keys = slice(chunk.start, chunk.stop), slice(chunk.low, chunk.high)
            query = q[:, heads, rows].to(exact)
            bias = shape.scores(((query + w[heads, None]) * scale).transpose(0, 1), shape.cut(table[heads]), scratch)
            _hide(bias, plan, chunk, shape)
            out[:, heads, rows], found = partial(
                query + u[heads, None],
                k[:, heads, keys],
                v[:, heads, keys],
                bias.transpose(0, 1),
                scale=scale,
                scratch=scratch,
            )
            lse[:, heads, rows] = found[..., 0]
        ctx.save_for_backward(q, k, v, r, u, w, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, *_ = saved
        own, apart = ctx.needs_input_grad[3:5], ctx.plan.apart
        # its working memory is gone by the time that the table of distances is turned round, which takes a copy
        dq, dk, dv, dk_own, dv_own, dtable, du, dw = _backward(
            saved, grad, (own[0] and apart, own[1] and apart), ctx.plan, ctx.scale
        )
        if not apart:
            dk_own, dv_own = (each if wanted else None for each, wanted in zip((dk, dv), own))
        streams = dk, dv, dk_own, dv_own
        return *gradients_of((q, k, v, r, u, w), streams, dtable, dq, du, dw), None, None


def _backward(
    saved: tuple[Tensor, ...], grad: Tensor, own: tuple[bool, bool], plan: ChunkPlan, scale: float
) -> tuple[Any, ...]:
    """Gradients of q, k, v, k_own and v_own (None where not wanted), the falling table, u and w."""
    q, k, v, r, u, w, out, lse = saved
    L, S, exact = q.shape[2], k.shape[2], lse.dtype
    table = falling(r, exact)
    dtable = torch.zeros_like(table)
    # +inf makes all weights of a row that sees nothing zero, instead of exp(-inf + inf)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    dq = rows_first(q, L, exact)
    dk, dv = (rows_first(q, S, exact).zero_() for _ in range(2))
    dk_own, dv_own = (rows_first(q, S, exact).zero_() if wanted else None for wanted in own)
    scratch = Scratch()
    du, dw = u.new_zeros(u.shape, dtype=exact), w.new_zeros(w.shape, dtype=exact)
    for chunk, heads, shape in _tiles(plan, q):
        rows, keys = slice(chunk.start, chunk.stop), slice(chunk.low, chunk.high)
        query, dout, result = (x[:, heads, rows].transpose(0, 1).to(exact) for x in (q, grad, out))
        key, value = (x[:, heads, keys].transpose(0, 1).to(exact) for x in (k, v))
        to_keys = (query + u[heads, None, None]) * scale
        to_distances = (query + w[heads, None, None]) * scale
        distance_keys = shape.cut(table[heads])

        # products are added to what is there already: no passes of their own
        weights, dweights = (scratch(name, (*query.shape[:3], key.shape[2]), key) for name in ("weights", "dweights"))
        distance_scores = shape.scores(to_distances, distance_keys, scratch)
        exponent = lse[:, heads, rows].transpose(0, 1)[..., None] * -LOG2E
        torch.add(exponent, distance_scores, alpha=LOG2E, out=weights)
        _hide(weights, plan, chunk, shape)
        add_scores(weights, to_keys, key, LOG2E).exp2_()
        dweights.copy_((dout * result).sum(-1, keepdim=True).neg_())
        add_scores(dweights, dout, value)
        dscores, dproduct = shape.gradient(dweights, weights, scratch)

        _collect(dk, dk_own, heads, dscores, to_keys, plan, chunk)
        _collect(dv, dv_own, heads, weights, dout, plan, chunk)
        for_keys = dscores @ key
        for_distances = (dproduct @ distance_keys).view_as(query)
        shape.cut(dtable[heads]).baddbmm_(dproduct.transpose(-1, -2), to_distances.flatten(1, 2))
        du[heads] += for_keys.sum((1, 2))
        dw[heads] += for_distances.sum((1, 2))
        dq[:, heads, rows] = for_keys.add_(for_distances).transpose(0, 1)
    return dq.mul_(scale), dk, dv, dk_own, dv_own, dtable, du.mul_(scale), dw.mul_(scale)


def _tiles(plan: ChunkPlan, q: Tensor) -> Iterator[tuple[Chunk, slice, Shift | _Gather]]:
    """Every chunk, in groups of as many heads as `TILE` allows; the widest early, so that scratch never grows."""
    B, H = q.shape[:2]
    limit = TILE["cuda" if q.is_cuda else "cpu"]
    for chunk in reversed(plan.chunks):
        group = max(1, limit // (B * (chunk.stop - chunk.start) * (chunk.high - chunk.low)))
        shape = _shape(plan, chunk)
        for head in range(0, H, group):
            yield chunk, slice(head, head + group), shape


def rows_first(like: Tensor, rows: int, dtype: torch.dtype) -> Float[Tensor, "B H n D"]:
    """Uninitialised, [B, n, H, D] in memory: as projections write and read it."""
    B, H, _, D = like.shape
    return large_pages(like.new_empty(B, rows, H, D, dtype=dtype)).transpose(1, 2)


def falling(r: Float[Tensor, "n H D"], dtype: torch.dtype) -> Float[Tensor, "H n+1 D"]:
    """The table per head, from the largest distance down to 0, then one spare row that no visible pair reads."""
    return torch.nn.functional.pad(r.to(dtype).transpose(0, 1).flip(1), (0, 0, 0, 1))


class Shift:
    """Distance scores where key columns stand as positions do, the last query in the last column: no element moves."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns

    def cut(self, table: Tensor) -> Tensor:
        """The distances of the oldest key seen from the last row, down to 0, and the spare row."""
        return table[:, table.shape[1] - self.columns - 1 :]

    def scores(self, queries: Float[Tensor, "H B l D"], table: Tensor, scratch: Scratch) -> Float[Tensor, "H B l s"]:
        """In the scratch."""
        H, B = queries.shape[:2]
        product = scratch("product", (H, B * self.rows, self.columns + 1), table)
        torch.bmm(queries.flatten(1, 2), table.transpose(1, 2), out=product)
        return self.view(product, B)

    def gradient(self, dweights: Tensor, weights: Tensor, scratch: Scratch) -> tuple[Tensor, Float[Tensor, "H Bl n"]]:
        """dweights · weights, and the same as the gradient of the product with the table. In the scratch."""
        product = scratch("product", (len(dweights), dweights.shape[1] * self.rows, self.columns + 1), dweights)
        return self.into(product, dweights, weights), product

    def into(self, product: Tensor, dweights: Tensor, weights: Tensor) -> Float[Tensor, "H B l s"]:
        """dweights · weights, in the view of the product, whose other numbers become zeros."""
        self.clear(product, dweights.shape[1])
        return torch.mul(dweights, weights, out=self.view(product, dweights.shape[1]))

    def clear(self, product: Float[Tensor, "H Bl s_and_one"], B: int) -> None:
        """Zeros, in place, where the view does not look."""
        corners = product.view(len(product), B, -1)
        corners[..., : self.rows - 1] = 0
        corners[..., -1] = 0

    def view(self, product: Float[Tensor, "H Bl s_and_one"], B: int) -> Float[Tensor, "H B l s"]:
        l, s = self.rows, self.columns
        return product.as_strided((len(product), B, l, s), (B * l * (s + 1), l * (s + 1), s, 1), l - 1)


class _Gather:
    """Distance scores between any positions: one element picked per pair."""

    def __init__(self, plan: ChunkPlan, chunk: Chunk):
        assert plan.position is not None
        self.n = plan.distances
        offset = plan.position.shape[1] - plan.first.shape[1]
        rows = plan.position[:, offset + chunk.start : offset + chunk.stop, None]
        distance = rows - plan.position[:, None, chunk.low : chunk.high]
        # hidden pairs may read any row of the table
        self.row = distance.neg_().add_(self.n - 1).clamp_(0, self.n - 1)
        self.hidden = _hidden(plan, chunk)

    def cut(self, table: Tensor) -> Tensor:
        return table

    def scores(self, queries: Float[Tensor, "H B l D"], table: Tensor, scratch: Scratch) -> Float[Tensor, "H B l s"]:
        return (queries @ table[:, None].transpose(-1, -2)).gather(-1, self._index(len(queries)))

    def gradient(self, dweights: Tensor, weights: Tensor, scratch: Scratch) -> tuple[Tensor, Float[Tensor, "H Bl n"]]:
        dscores = dweights.mul_(weights)
        product = dscores.new_zeros(*dscores.shape[:-1], self.n + 1)
        return dscores, product.scatter_add_(-1, self._index(len(dscores)), dscores).flatten(1, 2)

    def _index(self, heads: int) -> Int[Tensor, "H B l s"]:
        return self.row.expand(heads, *self.row.shape)


def _shape(plan: ChunkPlan, chunk: Chunk) -> Shift | _Gather:
    return Shift(chunk.stop - chunk.start, chunk.high - chunk.low) if plan.position is None else _Gather(plan, chunk)


def add_scores(
    into: Float[Tensor, "H B l s"], rows: Float[Tensor, "H B l D"], keys: Float[Tensor, "H B s D"], scale: float = 1.0
) -> Float[Tensor, "H B l s"]:
    """into += scale · rows · keysᵀ."""
    into.flatten(0, 1).baddbmm_(rows.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    return into


def _places(plan: ChunkPlan, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """The first key that each query of the chunk sees, the queries' columns, and the keys'."""
    device, offset = plan.first.device, chunk.high - chunk.stop
    row = torch.arange(offset + chunk.start, offset + chunk.stop, device=device)[:, None]
    return plan.first[:, chunk.start : chunk.stop, None], row, torch.arange(chunk.low, chunk.high, device=device)


def _hidden(plan: ChunkPlan, chunk: Chunk) -> Bool[Tensor, "B l s"]:
    """Which pairs are not seen, where there are holes."""
    assert plan.valid is not None
    first, row, column = _places(plan, chunk)
    return (column < first) | (column > row) | ~plan.valid[:, None, chunk.low : chunk.high]


def _hide(scores: Float[Tensor, "H B l s"], plan: ChunkPlan, chunk: Chunk, shape: Shift | _Gather) -> None:
    """-inf, in place, where a pair is not seen. Only the columns that hide something are touched."""
    if isinstance(shape, _Gather):
        scores.masked_fill_(shape.hidden, -torch.inf)
        return
    first, row, column = _places(plan, chunk)
    offset = chunk.high - chunk.stop
    diagonal = offset + chunk.start - chunk.low
    scores[..., diagonal:].masked_fill_(column[diagonal:] > row, -torch.inf)
    old = chunk.clear - chunk.low
    if old:
        scores[..., :old].masked_fill_(column[:old] < first, -torch.inf)


def _collect(
    every: Tensor,
    own: Tensor | None,
    heads: slice,
    weights: Float[Tensor, "H B l s"],
    rows: Float[Tensor, "H B l D"],
    plan: ChunkPlan,
    chunk: Chunk,
) -> None:
    """Add weightsᵀ · rows to the gradient of the chunk's keys: from all pairs, and from those inside own segments."""
    if own is None:
        into = every[:, heads, chunk.low : chunk.high].transpose(0, 1)
        add_product(into, weights.flatten(0, 1).transpose(1, 2), rows.flatten(0, 1))
        return
    total = (weights.transpose(-1, -2) @ rows).transpose(0, 1)
    every[:, heads, chunk.low : chunk.high] += total
    own[:, heads, chunk.all_own : chunk.high] += total[:, :, chunk.all_own - chunk.low :]
    if chunk.own < chunk.all_own:
        column = torch.arange(chunk.own, chunk.all_own, device=weights.device)
        inside = column >= plan.own[:, chunk.start : chunk.stop, None]
        mixed = weights[..., chunk.own - chunk.low : chunk.all_own - chunk.low] * inside
        own[:, heads, chunk.own : chunk.all_own] += (mixed.transpose(-1, -2) @ rows).transpose(0, 1)
