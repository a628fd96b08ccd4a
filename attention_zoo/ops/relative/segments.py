"""Relative attention segment by segment, each over keys gathered for it: memories, summaries of memories, its own.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{c(i) - c(j)}]) V        c: columns of the segment's own table of keys

A piece is some consecutive queries of one segment and the keys that they see, brought side by side in the order in
which they count, the last query's own key in the last column. So a distance is a difference of columns, whatever the
keys are, and is brought there by a view (`Shift`). Pieces that are alike run together.

Gradients of keys go to two streams, as in chunks.py: those of all pairs, and those of the last `own` columns alone,
which lie inside the segment. Scores are computed again in backward from the log-sum-exp: O(L · keys) time, O(L · D)
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.ops.relative.chunks import TILE, Shift, add_scores, falling
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Scratch, partial

Run = tuple[int, int, int]
"""Keys that stand side by side in the table as in a piece: its first column there, its first row here, how many."""


class Pieces(NamedTuple):
    """Pieces that are alike, n of them.

    Fields:
        starts: of each piece, the row of its first query; None: not everywhere do the others follow on it.
        rows: [n, R], the queries, as rows of [B · L]; any where there is none.
        asked: [n, R], where there is one; None: everywhere.
        keys: [n, W], the keys, as rows of [B · T]; any where there is none.
        there: [n, W], where there is one; None: everywhere.
        runs: of each piece, its keys as runs; None: too many to be worth it.
        own: how many of the last columns are in the queries' own segment.
    """

    starts: tuple[int, ...] | None
    rows: Int[Tensor, "n R"]
    asked: Bool[Tensor, "n R"] | None
    keys: Int[Tensor, "n W"]
    there: Bool[Tensor, "n W"] | None
    runs: tuple[tuple[Run, ...], ...] | None
    own: int


class PiecePlan(NamedTuple):
    """A call's pieces, each query in one of them at most.

    Fields:
        groups: pieces that are alike.
        distances: how many distances, from 0 on, the table of distance keys must hold.
        whole: whether every row of [B · L] is a query.
    """

    groups: tuple[Pieces, ...]
    distances: int
    whole: bool


def segment_attention(
    q: Float[Tensor, "B L H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    k_own: Float[Tensor, "B T H D"],
    v_own: Float[Tensor, "B T H D"],
    r: Float[Tensor, "n H D"],
    u: Float[Tensor, "H D"],
    w: Float[Tensor, "H D"],
    plan: PiecePlan,
    *,
    scale: float,
) -> Float[Tensor, "B L H D"]:
    """What each query attends to under the plan; zeros where a row is no query.

    Args:
        k, v: receive the gradients of all pairs.
        k_own, v_own: the same numbers; receive the gradients of the pairs inside the query's own segment.
        r: keys of the distances 0, 1, ..., plan.distances - 1, or more.
        u, w: added to the queries before they meet keys and distances.
        scale: factor on both terms.
    """
    return _Segments.apply(q, k, v, k_own, v_own, r, u, w, plan, scale)


class _Segments(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: PiecePlan, scale: float) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        table = falling(r, exact)
        out = _buffer(q, q.dtype, zero=not plan.whole)
        lse = q.new_full((len(out), q.shape[2]), torch.inf, dtype=exact)
        scratch = Scratch()
        for tile in _tiles(plan, q):
            key, value, queries = tile.take(k), tile.take(v), tile.rows_of(q)
            for heads in tile.heads:
                query = queries[:, :, heads].transpose(1, 2).to(exact)  # [n, h, R, D]
                shape = Shift(tile.R, tile.W)
                to_distances = ((query + w[heads, None]) * scale).transpose(0, 1)
                bias = tile.hide(shape.scores(to_distances, shape.cut(table[heads]), scratch))
                found, total = partial(
                    query + u[heads, None], key[:, :, heads].transpose(1, 2), value[:, :, heads].transpose(1, 2),
                    bias.transpose(0, 1), scale=scale, scratch=scratch,
                )  # fmt: skip
                tile.put(out[:, heads], found.transpose(1, 2))
                tile.put(lse[:, heads], total[..., 0].transpose(1, 2))
        ctx.save_for_backward(q, k, v, r, u, w, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out.view(q.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, out, lse = saved
        plan, scale, exact = ctx.plan, ctx.scale, lse.dtype
        wanted = ctx.needs_input_grad[3:5]
        table = falling(r, exact)
        dtable, du, dw = torch.zeros_like(table), *(torch.zeros_like(x, dtype=exact) for x in (u, w))
        dq = _buffer(q, exact, zero=not plan.whole)
        dk, dv = (_buffer(k, exact, zero=True) for _ in range(2))
        dk_own, dv_own = (_buffer(k, exact, zero=True) if want else None for want in wanted)
        scratch = Scratch()
        for tile in _tiles(plan, q):
            key, value = tile.take(k), tile.take(v)
            rows = tuple(tile.rows_of(x) for x in (q, grad, out.view(q.shape)))
            dkey, dvalue = (scratch(name, key.shape, dtable) for name in ("dkey", "dvalue"))
            for heads in tile.heads:
                query, dout, result = (x[:, :, heads].permute(2, 0, 1, 3).to(exact) for x in rows)
                keys, values = (x[:, :, heads].permute(2, 0, 1, 3).to(exact) for x in (key, value))
                to_keys = (query + u[heads, None, None]) * scale
                to_distances = (query + w[heads, None, None]) * scale
                shape = Shift(tile.R, tile.W)
                distance_keys = shape.cut(table[heads])

                full = (*query.shape[:3], tile.W)
                weights, dweights = (scratch(name, full, query) for name in ("weights", "dweights"))
                exponent = tile.exponent(lse[:, heads])
                torch.add(exponent, shape.scores(to_distances, distance_keys, scratch), alpha=LOG2E, out=weights)
                tile.hide(weights)
                add_scores(weights, to_keys, keys, LOG2E).exp2_()
                dweights.copy_((dout * result).sum(-1, keepdim=True).neg_())
                add_scores(dweights, dout, values)
                dscores, dproduct = shape.gradient(dweights, weights, scratch)

                dkey[:, :, heads] = (dscores.transpose(-1, -2) @ to_keys).permute(1, 2, 0, 3)
                dvalue[:, :, heads] = (weights.transpose(-1, -2) @ dout).permute(1, 2, 0, 3)
                for_keys = dscores @ keys
                for_distances = (dproduct @ distance_keys).view_as(query)
                shape.cut(dtable[heads]).baddbmm_(dproduct.transpose(-1, -2), to_distances.flatten(1, 2))
                du[heads] += for_keys.sum((1, 2))
                dw[heads] += for_distances.sum((1, 2))
                tile.put(dq[:, heads], for_keys.add_(for_distances).permute(1, 2, 0, 3))
            tile.add(dk, dk_own, dkey)
            tile.add(dv, dv_own, dvalue)
        dr = dtable[:, :-1].flip(1).transpose(0, 1)
        gradients = (dq.mul_(scale), dk, dv, dk_own, dv_own, dr, du.mul_(scale), dw.mul_(scale))
        likes = (q, k, v, k, v, r, u, w)
        found = (None if x is None else x.to(like.dtype).view(like.shape) for x, like in zip(gradients, likes))
        return *found, None, None


class _Tile:
    """Some pieces of a group, of which some heads are computed at once."""

    def __init__(self, group: Pieces, pieces: slice, heads: list[slice]):
        self.rows, self.keys, self.heads, self.own = group.rows[pieces], group.keys[pieces], heads, group.own
        self.asked, self.there = (None if x is None else x[pieces] for x in (group.asked, group.there))
        self.runs = None if group.runs is None else group.runs[pieces]
        self.R, self.W = self.rows.shape[1], self.keys.shape[1]
        first = () if group.starts is None else group.starts[pieces]
        self.alone = slice(first[0], first[0] + self.R) if len(first) == 1 else None

    def rows_of(self, x: Float[Tensor, "B L H D"]) -> Float[Tensor, "n R H D"]:
        if self.alone is not None:
            return _flat(x)[None, self.alone]
        return _flat(x)[self.rows.flatten()].unflatten(0, self.rows.shape)

    def take(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "n W H D"]:
        flat = _flat(x)
        if self.runs is None or self.there is not None:
            return flat.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape)
        pieces = [flat[start : start + count] for runs in self.runs for start, _, count in runs]
        return torch.cat(pieces).unflatten(0, self.keys.shape)

    def hide(self, scores: Float[Tensor, "h n R W"]) -> Float[Tensor, "h n R W"]:
        """-inf, in place, for the future and for keys that are not there."""
        if self.R > 1:
            future = torch.ones(self.R, self.R, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., self.W - self.R :].masked_fill_(future, -torch.inf)
        return scores if self.there is None else scores.masked_fill_(~self.there[:, None], -torch.inf)

    def exponent(self, lse: Float[Tensor, "BL h"]) -> Float[Tensor, "h n R 1"]:
        """What makes weights of scores, base 2; -inf where there is no query."""
        found = lse[self.rows.flatten()].unflatten(0, self.rows.shape)
        found = found if self.asked is None else found.masked_fill(~self.asked[..., None], torch.inf)
        return found.permute(2, 0, 1)[..., None] * -LOG2E

    def put(self, into: Tensor, found: Float[Tensor, "n R ..."]) -> None:
        """Into the rows of the queries."""
        if self.alone is not None:
            into[self.alone] = found[0]
            return
        rows, found = self.rows.flatten(), found.flatten(0, 1)
        if self.asked is not None:
            at = self.asked.flatten()
            rows, found = rows[at], found[at]
        into[rows] = found.to(into.dtype)

    def add(self, every: Tensor, own: Tensor | None, found: Float[Tensor, "n W H D"]) -> None:
        """To the gradients of the keys: all, and those of the own segment."""
        first = self.W - self.own
        if self.runs is None:
            found = found if self.there is None else found.masked_fill(~self.there[..., None, None], 0)
            every.index_add_(0, self.keys.flatten(), found.flatten(0, 1))
            if own is not None:
                own.index_add_(0, self.keys[:, first:].flatten(), found[:, first:].flatten(0, 1))
            return
        for runs, piece in zip(self.runs, found):
            for start, at, count in runs:
                every[start : start + count] += piece[at : at + count]
                skip = min(max(0, first - at), count)
                if own is not None and skip < count:
                    own[start + skip : start + count] += piece[at + skip : at + count]


def _tiles(plan: PiecePlan, q: Tensor) -> Iterator[_Tile]:
    """The largest pieces first, so that scratch never grows; as many pieces, or else heads, as `TILE` allows."""
    H, limit = q.shape[2], TILE["cuda" if q.is_cuda else "cpu"]
    for group in sorted(plan.groups, key=lambda group: -group.rows.shape[1] * group.keys.shape[1]):
        scores = group.rows.shape[1] * group.keys.shape[1]
        together = min(H, max(1, limit // scores))
        heads = [slice(head, head + together) for head in range(0, H, together)]
        count = max(1, limit // (scores * together))
        for piece in range(0, len(group.rows), count):
            yield _Tile(group, slice(piece, piece + count), heads)


def _flat(x: Tensor) -> Float[Tensor, "BL H D"]:
    return x.flatten(0, 1)


def _buffer(like: Float[Tensor, "B L H D"], dtype: torch.dtype, zero: bool) -> Float[Tensor, "BL H D"]:
    made = large_pages(like.new_empty(like.shape[0] * like.shape[1], *like.shape[2:], dtype=dtype))
    return made.zero_() if zero else made
