"""Relative attention segment by segment, each over keys gathered for it: memories, summaries of memories, its own.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{c(i) - c(j)}]) V        c: columns of the segment's own table of keys

A piece is some consecutive queries of one segment and the keys that they see, brought side by side in the order in
which they count, the last query's own key in the last column. So a distance is a difference of columns, whatever the
keys are, and is brought there by a view (`Shift`). Pieces that are alike run together; of long ones, some queries after
others, each lot over the columns up to its last query's own.

Gradients of keys go to two streams, as in chunks.py: those of all pairs, and those of the last `own` columns alone,
which lie inside the segment. Scores are computed again in backward, whole rows at once: O(L · keys) time, O(L · D)
memory, of which nothing but the inputs, the output and its log-sum-exp is saved. Between two products there are as few
passes over the scores as can be: one product is added to where the other is, what rows bring stands there first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.ops.relative.chunks import ROWS, TILE, Shift, falling
from attention_zoo.ops.relative.operands import RelativeOperands, gradients_of
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, LOWEST, Scratch

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


def segment_attention(
    given: RelativeOperands, plan: PiecePlan, *, scale: float, slots: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "B L H D"]:
    """What each query attends to under the plan; zeros where a row is no query.

    Args:
        given: q of [B, L, H, D], keys and values of [B, T, H, D], distances up to plan.distances - 1 or more.
        scale: factor on both terms.
        slots: keys and values [B, G, H, D] that stand before the others in the table; None: they are among them.
    """
    return _Segments.apply(*given, plan, scale, *(slots or (None, None)))


class _Segments(torch.autograd.Function):
    """Tiles are [h, n, R, D]: heads first, so that the table of a head serves the rows of all pieces at once."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, plan: PiecePlan, scale: float, slots_k, slots_v) -> Tensor:
        run = _Run(r, u, w, scale, q.dtype)
        out = _buffer(q, q.dtype, zero=not plan.whole, spare=1)
        lse = run.table.new_empty(*out.shape[:2], 1)  # base 2
        keys_given, values_given = Table(k, slots_k), Table(v, slots_v)
        for tile in _tiles(plan, q):
            asked = run.sides(tile.rows_of(q))
            keys, values = (tile.keys_of(x, name, run) for x, name in ((keys_given, "keys"), (values_given, "values")))
            found = run.scratch("found", asked[0].shape, values)
            total = run.scratch("lse", (*found.shape[:3], 1), values)
            for part in tile.parts:
                weights = run.exponents(part, asked, keys, None)
                peak = weights.amax(-1, keepdim=True).clamp_(min=LOWEST)
                weights.sub_(peak).exp2_()
                into, sums = part.asked(found), part.asked(total)
                torch.sum(weights, -1, keepdim=True, out=sums)
                _multiply(into, weights, part.seen(values), beta=0)
                into.div_(sums)
                sums.log2_().add_(peak)
            tile.put(out, found)
            tile.put(lse, total)
        out = out[:-1]
        ctx.save_for_backward(q, k, v, slots_k, slots_v, r, u, w, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out.view(q.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slots_k, slots_v, r, u, w, out, lse = saved
        plan, run, scale = ctx.plan, _Run(r, u, w, ctx.scale, q.dtype), ctx.scale
        exact, table, keys_given, values_given = run.table.dtype, run.table, Table(k, slots_k), Table(v, slots_v)
        grad, out = grad if len(grad) == 1 else grad.contiguous(), out.view(q.shape)
        dtable, du, dw = torch.zeros_like(table), *(torch.zeros_like(x, dtype=exact) for x in (u, w))
        dq = _buffer(q, exact, zero=not plan.whole, spare=1)
        spare = keys_given.front * len(k)
        dk, dv = (_buffer(k, exact, zero=True, spare=spare) for _ in range(2))
        own = (_buffer(k, exact, zero=True, spare=spare) if want else None for want in ctx.needs_input_grad[3:5])
        dk_own, dv_own = own
        for tile in _tiles(plan, q):
            asked = to_keys, to_distances = run.sides(tile.rows_of(q))
            shift = _by_heads(tile.rows_of(lse[None]), "lse", run).neg_()
            if tile.empty is not None:
                shift.masked_fill_(tile.empty, -torch.inf)  # so that its weights are zeros
            keys, values = (tile.keys_of(x, name, run) for x, name in ((keys_given, "keys"), (values_given, "values")))
            dkeys, dvalues = (run.scratch(name, keys.shape, keys) for name in ("dkeys", "dvalues"))
            for_keys, for_distances = (run.scratch(name, to_keys.shape, keys) for name in ("dquery", "more"))
            dout = _by_heads(tile.rows_of(grad), "dout", run)
            delta = torch.mul(dout, tile.rows_of(out), out=for_keys).sum(-1, keepdim=True).neg_()
            for part in tile.parts:
                beta, distances = 0 if part.covers_all else 1, part.shape.cut(table[part.heads])
                mine, grads = part.seen(keys), part.asked(dout)
                weights = run.exponents(part, asked, keys, part.asked(shift)).exp2_()
                _multiply(part.seen(dvalues), weights.transpose(-1, -2), grads, beta=beta)
                dweights = run.scratch("dweights", weights.shape, weights).copy_(part.asked(delta))
                _multiply(dweights, grads, part.seen(values).transpose(-1, -2))
                dscores = weights.mul_(dweights)
                _multiply(part.seen(dkeys), dscores.transpose(-1, -2), part.asked(to_keys), beta=beta)
                _multiply(part.asked(for_keys), dscores, mine, beta=0, alpha=scale)
                dproduct = run.dproduct(part, weights)
                part.asked(for_distances).flatten(1, 2).baddbmm_(dproduct, distances, beta=0, alpha=scale)
                rows = part.asked(to_distances).flatten(1, 2)
                part.shape.cut(dtable[part.heads]).baddbmm_(dproduct.transpose(-1, -2), rows)
            du += for_keys.sum((1, 2))
            dw += for_distances.sum((1, 2))
            tile.put(dq, for_keys.add_(for_distances))
            tile.add(dk, dk_own, dkeys)
            tile.add(dv, dv_own, dvalues)
        streams, of_slots = zip(*(keys_given.apart(each) for each in (dk, dv, dk_own, dv_own)))
        return *gradients_of((q, k, v, r, u, w), streams, dtable, dq[:-1], du, dw), None, None, *of_slots[:2]


class Table:
    """Keys, or values, as [B · T] rows: those of slots first in each of the B, where they are given apart."""

    def __init__(self, x: Float[Tensor, "B S H D"], slots: Float[Tensor, "B G H D"] | None):
        self.rest, self.slots = x, slots
        self.front = 0 if slots is None else slots.shape[1]
        self.size = self.front + x.shape[1]

    @cached_property
    def whole(self) -> Float[Tensor, "BT H D"]:
        return _flat(self.rest if self.slots is None else torch.cat([self.slots, self.rest], 1))

    def run(self, start: int, count: int) -> Float[Tensor, "count H D"]:
        """So many rows, all of slots or none."""
        if self.slots is None:
            return self.whole[start : start + count]
        row, column = divmod(start, self.size)
        slots = column < self.front
        return (self.slots if slots else self.rest)[row].narrow(0, column - (0 if slots else self.front), count)

    def apart(self, grad: Float[Tensor, "BT H D"] | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the others, and of slots."""
        if self.slots is None or grad is None:
            return grad, None
        slots, rest = grad.view(-1, self.size, *grad.shape[1:]).split([self.front, self.size - self.front], 1)
        return rest, slots.to(self.slots.dtype)


class _Run:
    """What all tiles of a pass share."""

    def __init__(self, r: Tensor, u: Tensor, w: Tensor, scale: float, dtype: torch.dtype):
        exact = torch.promote_types(dtype, torch.float32)
        self.table, self.scale, self.scratch = falling(r, exact), scale, Scratch()
        # features first: products with it are a fifth faster
        self.features = self.table.transpose(1, 2).contiguous()
        self.added = tuple((x.to(exact) * scale)[:, None, None] for x in (u, w))
        self.bounds: dict[int, Tensor] = {}

    def sides(self, query: Float[Tensor, "H n R D"]) -> tuple[Tensor, Tensor]:
        """scale · what meets keys, and what meets distances, [H, n, R, D]."""
        first, second = (
            torch.add(more, query, alpha=self.scale, out=self.scratch(name, query.shape, query))
            for name, more in zip(("to_keys", "to_distances"), self.added)
        )
        return first, second

    def exponents(
        self,
        part: _Part,
        asked: tuple[Tensor, Tensor],
        keys: Float[Tensor, "H n W D"],
        shift: Float[Tensor, "h n l 1"] | None,
    ) -> Float[Tensor, "h n l s"]:
        """log2(e) · scores + shift, -inf where a key is hidden; in the scratch.

        They stand where the product with distances does, in its shifted view, and the product with keys is added there.
        """
        to_keys, to_distances = map(part.asked, asked)
        h, n, l, _ = to_keys.shape
        product = self.scratch("product", (h, n * l, part.columns + 1), keys)
        if shift is not None:
            product.view(h, n, l, -1).copy_(shift)
        features = self.features[part.heads, :, -part.columns - 1 :]
        product.baddbmm_(to_distances.flatten(1, 2), features, beta=0 if shift is None else 1, alpha=LOG2E)
        found = part.shape.view(product, n)
        _multiply(found, to_keys, part.seen(keys).transpose(-1, -2), alpha=LOG2E)
        if l > 1:
            # whose row is later; a minimum is the fastest way to write it
            last = found[..., part.columns - l :]
            torch.minimum(last, self._past(l), out=last)
        if part.tile.missing is not None:
            found.masked_fill_(part.tile.missing[..., : part.columns], -torch.inf)
        return found

    def _past(self, l: int) -> Float[Tensor, "l l"]:
        """-inf where the column is later than the row, +inf elsewhere."""
        if l not in self.bounds:
            later = torch.ones(l, l, dtype=torch.bool, device=self.table.device).triu_(1)
            self.bounds[l] = self.table.new_full((l, l), torch.inf).masked_fill_(later, -torch.inf)
        return self.bounds[l]

    def dproduct(self, part: _Part, dscores: Float[Tensor, "h n l s"]) -> Float[Tensor, "h nl s_and_one"]:
        """The product's gradient, of which that of scores is a view: its other numbers become zeros."""
        h, n, l, s = dscores.shape
        product = self.scratch("product", (h, n * l, s + 1), dscores)
        part.shape.clear(product, n)
        return product


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


class _Tile:
    """One piece and the parts in which it is computed, the last rows of some heads first; or several, in one part."""

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

    def rows_of(self, x: Float[Tensor, "B L H D"]) -> Float[Tensor, "H n R D"]:
        """The queries' rows, a view where it can be."""
        flat = _flat(x)
        return (flat[None, self.alone] if self.alone is not None else flat[self.rows]).permute(2, 0, 1, 3)

    def keys_of(self, table: Table, name: str, run: _Run) -> Float[Tensor, "H n W D"]:
        """The keys' rows, in the scratch."""
        if self.runs is None or self.missing is not None or len(self.runs) > 1:
            found = table.whole.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape)
            return _by_heads(found.permute(2, 0, 1, 3), name, run)
        H, D = table.rest.shape[2:]
        into = run.scratch(name, (H, 1, self.W, D), run.table)
        for start, at, count in self.runs[0]:
            into[:, 0, at : at + count] = table.run(start, count).transpose(0, 1)
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
        count = 1 if len(heads) > 1 or rows < group.rows.shape[1] else max(1, limit // (scores * together))
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


def _by_heads(x: Float[Tensor, "H n *rest"], name: str, run: _Run) -> Float[Tensor, "H n *rest"]:
    return run.scratch(name, tuple(x.shape), run.table).copy_(x)


def _multiply(
    into: Float[Tensor, "h n a b"],
    left: Float[Tensor, "h n a c"],
    right: Float[Tensor, "h n c b"],
    *,
    beta: int = 1,
    alpha: float = 1,
) -> None:
    """into = beta · into + alpha · left · right. Raises where one of them would have to be copied."""
    into, left, right = (x.view(-1, *x.shape[2:]) for x in (into, left, right))
    into.baddbmm_(left, right, beta=beta, alpha=alpha)


def _buffer(
    like: Float[Tensor, "B L H D"], dtype: torch.dtype, zero: bool, spare: int = 0
) -> Float[Tensor, "BL_and_spare H D"]:
    made = large_pages(like.new_empty(like.shape[0] * like.shape[1] + spare, *like.shape[2:], dtype=dtype))
    return made.zero_() if zero else made
