"""Relative attention segment by segment, each over keys gathered for it: memories, summaries of memories, its own.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{c(i) - c(j)}]) V        c: columns of the segment's own table of keys

A piece is some consecutive queries of one segment and the keys that they see, brought side by side in the order in
which they count, the last query's own key in the last column. So a distance is a difference of columns, whatever the
keys are, and is brought there by a view (`Shift`). Pieces that are alike run together; of long ones, some queries after
others, each lot over the columns up to its last query's own.

Gradients of keys go to two streams, as in chunks.py: those of all pairs, and those of the last `own` columns alone,
which lie inside the segment. Scores are computed again in backward, whole rows at once: O(L · keys) time, O(L · D)
memory, of which nothing but the inputs and the output is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.ops.relative.chunks import ROWS, TILE, Shift, falling
from attention_zoo.ops.relative.operands import RelativeOperands, gradients_of
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import Scratch

Run = tuple[int, int, int]
"""Keys that stand side by side in the table as in a piece: its first column there, its first row here, how many."""


class Pieces(NamedTuple):
    """Pieces that are alike, n of them.

    Fields:
        starts: of each piece, the row of its first query; None: not everywhere do the others follow on it.
        rows: [n, R], the queries, as rows of [B · L]; any where there is none.
        empty: [n, R, 1], where there is none; None: nowhere.
        places: [n, R], where their results go: their rows, or behind the last one where there is none.
        keys: [n, W], the keys, as rows of [B · T]; any where there is none.
        missing: [n, 1, W], where there is none; None: nowhere.
        runs: of each piece, its keys as runs; None: too many to be worth it.
        own: how many of the last columns are in the queries' own segment, at most.
        far: [n, own, 1, 1], which of these are not, or missing; None: none.
    """

    starts: tuple[int, ...] | None
    rows: Int[Tensor, "n R"]
    empty: Bool[Tensor, "n R 1"] | None
    places: Int[Tensor, "n R"]
    keys: Int[Tensor, "n W"]
    missing: Bool[Tensor, "n 1 W"] | None
    runs: tuple[tuple[Run, ...], ...] | None
    own: int
    far: Bool[Tensor, "n own 1 1"] | None


class PiecePlan(NamedTuple):
    """A call's pieces, each query in one of them at most.

    Fields:
        groups: pieces that are alike.
        distances: how many distances, from 0 on, the table of distance keys must hold.
        whole: whether every row of [B · L] is a query.
        together: whether as much as fits runs at once, filled up: few operators, rather than few scores.
    """

    groups: tuple[Pieces, ...]
    distances: int
    whole: bool
    together: bool


def segment_attention(given: RelativeOperands, plan: PiecePlan, *, scale: float) -> Float[Tensor, "B L H D"]:
    """What each query attends to under the plan; zeros where a row is no query.

    Args:
        given: q of [B, L, H, D], keys and values of [B, T, H, D], distances up to plan.distances - 1 or more.
        scale: factor on both terms.
    """
    return _Segments.apply(*given, plan, scale)


class _Segments(torch.autograd.Function):
    """Tiles are [h, n, R, D]: heads first, so that the table of a head serves the rows of all pieces at once."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: PiecePlan, scale: float) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        table = falling(r, exact)
        out = _buffer(q, q.dtype, zero=not plan.whole, spare=1)
        scratch = Scratch()
        for tile in _tiles(plan, q):
            query = tile.rows_of(q, "query", table, scratch)
            keys, values = (tile.keys_of(x, name, table, scratch) for x, name in ((k, "keys"), (v, "values")))
            found = scratch("found", query.shape, query)
            for part in tile.parts:
                sides = part.sides(query, u, w, scale)
                weights = part.weights(*sides, part.seen(keys), part.shape.cut(table[part.heads]), scratch)
                _multiply(part.asked(found), weights, part.seen(values), beta=0)
            tile.put(out, found)
        out = out[:-1]
        ctx.save_for_backward(q, k, v, r, u, w, out)
        ctx.plan, ctx.scale = plan, scale
        return out.view(q.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, out = saved
        plan, scale, exact = ctx.plan, ctx.scale, torch.promote_types(q.dtype, torch.float32)
        table = falling(r, exact)
        dtable, du, dw = torch.zeros_like(table), *(torch.zeros_like(x, dtype=exact) for x in (u, w))
        dq = _buffer(q, exact, zero=not plan.whole, spare=1)
        dk, dv = (_buffer(k, exact, zero=True) for _ in range(2))
        dk_own, dv_own = (_buffer(k, exact, zero=True) if want else None for want in ctx.needs_input_grad[3:5])
        scratch = Scratch()
        for tile in _tiles(plan, q):
            query, dout, result = (
                tile.rows_of(x, name, table, scratch)
                for x, name in ((q, "query"), (grad, "dout"), (out.view(q.shape), "found"))
            )
            keys, values = (tile.keys_of(x, name, table, scratch) for x, name in ((k, "keys"), (v, "values")))
            dkeys, dvalues = (scratch(name, keys.shape, keys) for name in ("dkeys", "dvalues"))
            delta = (dout * result).sum(-1, keepdim=True).neg_()
            dquery = result  # which is not needed any more
            for part in tile.parts:
                beta = 0 if part.covers_all else 1
                distances = part.shape.cut(table[part.heads])
                to_keys, to_distances = part.sides(query, u, w, scale)
                weights = part.weights(to_keys, to_distances, part.seen(keys), distances, scratch)
                _multiply(part.seen(dvalues), weights.transpose(-1, -2), part.asked(dout), beta=beta)
                dweights = scratch("scores", weights.shape, weights).copy_(part.asked(delta))
                _multiply(dweights, part.asked(dout), part.seen(values).transpose(-1, -2))
                dscores, dproduct = part.shape.gradient(dweights, weights, scratch)
                _multiply(part.seen(dkeys), dscores.transpose(-1, -2), to_keys, beta=beta)
                for_keys = part.asked(dquery)
                _multiply(for_keys, dscores, part.seen(keys), beta=0)
                du[part.heads] += for_keys.sum((1, 2))
                for_distances = (dproduct @ distances).view_as(to_distances)
                dw[part.heads] += for_distances.sum((1, 2))
                for_keys.add_(for_distances)
                part.shape.cut(dtable[part.heads]).baddbmm_(dproduct.transpose(-1, -2), to_distances.flatten(1, 2))
            tile.put(dq, dquery)
            tile.add(dk, dk_own, dkeys)
            tile.add(dv, dv_own, dvalues)
        streams = dk, dv, dk_own, dv_own
        return *gradients_of((q, k, v, r, u, w), streams, dtable, dq[:-1], du, dw, scale), None, None


class _Part:
    """Some heads and rows of a tile, over the columns up to the last row's own."""

    def __init__(self, tile: _Tile, heads: slice, start: int, stop: int):
        self.tile, self.heads, self.rows = tile, heads, slice(start, stop)
        self.columns = tile.W - tile.R + stop
        self.covers_all = stop == tile.R
        whole = heads == slice(0, tile.heads) and start == 0
        # nothing is cut where a tile has one part, the same for queries and keys
        self.cut_rows = None if whole and self.covers_all else (heads, slice(None), self.rows)
        self.cut_columns = None if whole and self.covers_all else (heads, slice(None), slice(self.columns))
        self.shape = Shift(stop - start, self.columns)

    def asked(self, x: Float[Tensor, "H n R D"]) -> Float[Tensor, "h n l D"]:
        return x if self.cut_rows is None else x[self.cut_rows]

    def seen(self, x: Float[Tensor, "H n W D"]) -> Float[Tensor, "h n s D"]:
        return x if self.cut_columns is None else x[self.cut_columns]

    def sides(self, query: Float[Tensor, "H n R D"], u: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What meets keys, and what meets distances, [h, n, l, D]."""
        query = self.asked(query)
        return (query + u[self.heads, None, None]) * scale, (query + w[self.heads, None, None]) * scale

    def weights(
        self, to_keys: Tensor, to_distances: Tensor, keys: Tensor, distances: Tensor, scratch: Scratch
    ) -> Float[Tensor, "h n l s"]:
        """Those of the softmax, in the scratch; zeros where there is no query."""
        h, n, l, _ = to_keys.shape
        scores, weights = (scratch(name, (h, n, l, self.columns), keys) for name in ("scores", "weights"))
        _multiply(scores, to_keys, keys.transpose(-1, -2), beta=0)
        scores += self.shape.scores(to_distances, distances, scratch)
        missing, empty = self.tile.missing, self.tile.empty
        if l > 1:
            future = torch.ones(l, l, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., self.columns - l :].masked_fill_(future, -torch.inf)
        if missing is not None:
            scores.masked_fill_(missing[..., : self.columns], -torch.inf)
        torch.softmax(scores, -1, out=weights)
        return weights if empty is None else weights.masked_fill_(empty[:, self.rows], 0)


class _Tile:
    """Some pieces of a group, and the parts in which they are computed: the last rows of some heads first."""

    def __init__(self, group: Pieces, pieces: slice, heads: list[slice], rows: int):
        self.rows, self.keys, self.own = group.rows[pieces], group.keys[pieces], group.own
        self.places = group.places[pieces]
        self.empty, self.missing, self.far = (
            None if x is None else x[pieces] for x in (group.empty, group.missing, group.far)
        )
        self.runs = None if group.runs is None else group.runs[pieces]
        self.R, self.W, self.heads = self.rows.shape[1], self.keys.shape[1], heads[-1].stop
        first = () if group.starts is None else group.starts[pieces]
        self.alone = slice(first[0], first[0] + self.R) if len(first) == 1 else None
        starts = range(0, self.R, rows)[::-1]
        self.parts = [_Part(self, some, start, min(start + rows, self.R)) for some in heads for start in starts]

    def rows_of(self, x: Float[Tensor, "B L H D"], name: str, like: Tensor, scratch: Scratch) -> Tensor:
        """The queries' rows, [H, n, R, D], in the scratch."""
        flat = _flat(x)
        found = flat[None, self.alone] if self.alone is not None else flat[self.rows]
        return _by_heads(found, name, like, scratch)

    def keys_of(self, x: Float[Tensor, "B T H D"], name: str, like: Tensor, scratch: Scratch) -> Tensor:
        """The keys' rows, [H, n, W, D], in the scratch."""
        flat = _flat(x)
        if self.runs is None or self.missing is not None or len(self.runs) > 1:
            return _by_heads(
                flat.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape), name, like, scratch
            )
        into = scratch(name, (x.shape[2], 1, self.W, x.shape[3]), like)
        for start, at, count in self.runs[0]:
            into[:, 0, at : at + count] = flat[start : start + count].transpose(0, 1)
        return into

    def put(self, into: Float[Tensor, "BL H D"], found: Float[Tensor, "H n R D"]) -> None:
        """Into the rows of the queries."""
        by_rows = found.permute(1, 2, 0, 3)
        if self.alone is not None:
            into[self.alone] = by_rows[0]
        else:
            into[self.places] = by_rows.to(into.dtype)

    def add(self, every: Tensor, own: Tensor | None, found: Float[Tensor, "H n W D"]) -> None:
        """To the gradients of the keys, [BT, H, D]: all, and those of the own segment."""
        found, first = found.permute(1, 2, 0, 3), self.W - self.own
        if self.runs is None:
            found = found if self.missing is None else found.masked_fill(self.missing.transpose(1, 2)[..., None], 0)
            _add_rows(every, self.keys, found)
            if own is not None:
                found = found[:, first:]
                found = found if self.far is None else found.masked_fill(self.far, 0)
                _add_rows(own, self.keys[:, first:], found)
            return
        for runs, piece in zip(self.runs, found):
            for start, at, count in runs:
                every[start : start + count] += piece[at : at + count]
                skip = min(max(0, first - at), count)
                if own is not None and skip < count:
                    own[start + skip : start + count] += piece[at + skip : at + count]


def _tiles(plan: PiecePlan, q: Tensor) -> Iterator[_Tile]:
    """The largest pieces first, so that scratch never grows; as many pieces, or else heads, as `TILE` allows."""
    # on a CPU more at once than chunks do: rows are whole, so that a part takes few passes, and starting them costs
    H, limit = q.shape[2], TILE["cuda"] if plan.together or q.is_cuda else 4 * TILE["cpu"]
    for group in sorted(plan.groups, key=lambda group: -group.rows.shape[1] * group.keys.shape[1]):
        rows = min(group.rows.shape[1], limit if plan.together else ROWS)
        scores = rows * group.keys.shape[1]
        together = min(H, max(1, limit // scores))
        together = -(-H // -(-H // together))  # alike many in each part
        heads = [slice(head, min(head + together, H)) for head in range(0, H, together)]
        count = max(1, limit // (scores * together))
        for piece in range(0, len(group.rows), count):
            yield _Tile(group, slice(piece, piece + count), heads, rows)


def _add_rows(into: Float[Tensor, "BT H D"], rows: Int[Tensor, "n W"], found: Float[Tensor, "n W H D"]) -> None:
    """In a fixed order, which `index_add_` has on a CPU alone."""
    if into.is_cuda:
        into.index_put_((rows,), found, accumulate=True)
    else:
        into.index_add_(0, rows.flatten(), found.flatten(0, 1))


def _flat(x: Tensor) -> Float[Tensor, "BL H D"]:
    return x.flatten(0, 1)


def _by_heads(x: Float[Tensor, "n R H D"], name: str, like: Tensor, scratch: Scratch) -> Float[Tensor, "H n R D"]:
    n, R, H, D = x.shape
    return scratch(name, (H, n, R, D), like).copy_(x.permute(2, 0, 1, 3))


def _multiply(
    into: Float[Tensor, "h n a b"], left: Float[Tensor, "h n a c"], right: Float[Tensor, "h n c b"], *, beta: int = 1
) -> None:
    """into = beta · into + left · right. Raises where one of them would have to be copied."""
    into, left, right = (x.view(-1, *x.shape[2:]) for x in (into, left, right))
    into.baddbmm_(left, right, beta=beta)


def _buffer(
    like: Float[Tensor, "B L H D"], dtype: torch.dtype, zero: bool, spare: int = 0
) -> Float[Tensor, "BL_and_spare H D"]:
    made = large_pages(like.new_empty(like.shape[0] * like.shape[1] + spare, *like.shape[2:], dtype=dtype))
    return made.zero_() if zero else made
