"""The executor: run a list of tiles, each some query rows against some keys, and recompute in backward.

A tile's parts see disjoint keys and are merged exactly (ops/softmax/partial.py); what is saved for backward is q, k, v,
the output and one log-sum-exp per row, so memory is O(L·D) whatever the pattern. Gradients of keys and values
accumulate in place: plain autograd through `k[:, :, a:b]` would allocate a full-size zero tensor per tile, which is
quadratic (pytorch#9701).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attention_zoo.layout.host import array_of
from attention_zoo.ops.softmax.common import Common, CommonKeys
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, partial_backward
from attention_zoo.ops.softmax.parts import Part, Shared, View, Windows, some_rows

SCORES = {"cpu": 1 << 19}
"""Scores that a step should hold, over batch and heads: near the cache on a CPU. See `scores_at_once`."""
_SCORES_GPU = 1 << 26  # a few steps should fill the device


def scores_at_once(x: Tensor) -> int:
    """How many scores a step on this tensor's device should hold. Two copies of them exist in backward."""
    return SCORES.get(x.device.type, _SCORES_GPU)


class Rows(NamedTuple):
    """Each batch row's own query rows; where `valid` is False it has fewer, and the entry is ignored."""

    columns: Int[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]


class Tile(NamedTuple):
    """Query rows and the parts that they see.

    Every row of every head belongs to at most one tile with a slice of rows (with any step), and to at most one with
    `Rows`, which then decides alone. Rows in none yield zeros.

    Fields:
        heads: which query heads: one, or whole groups of those that share a key head.
    """

    rows: slice | Rows
    parts: Sequence[Part]
    heads: slice = slice(None)


def run_tiles(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    tiles: Sequence[Tile],
    *,
    scale: float,
    learned: Sequence[Tensor] = (),
    mild: Bool[Tensor, "B H L 1"] | None = None,
    asked: Bool[Tensor, "B 1 L 1"] | None = None,
    sink: Float[Tensor, " H"] | None = None,
    turned: Float[Tensor, "B H L D"] | None = None,
    common: Common | None = None,
) -> Float[Tensor, "B H L D"]:
    """Attention along the tiles.

    Args:
        learned: tensors that the biases depend on and that want a gradient.
        mild: rows whose scores are known to be small (ops/pattern/mild.py); None: none is.
        asked: rows that are queries; the others yield zeros, and take part in no gradient. None: all.
        sink: the score of one more key for each head, whose value is zero: it takes weight and gives nothing.
        turned: the queries as parts that are so marked see them; default the same.
        common: keys that all tiles with a slice of rows see besides.
    """
    tiles = sorted(tiles, key=lambda tile: isinstance(tile.rows, Rows))
    return _Tiles.apply(q, k, v, tiles, scale, mild, asked, sink, turned, common, *learned)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        scale: float,
        mild: Tensor | None,
        asked: Tensor | None,
        sink: Tensor | None,
        turned: Tensor | None,
        common: Common | None,
        *learned: Tensor,
    ) -> Tensor:
        B, H, L, D = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        # laid out as the next projection wants it: merging the heads is then free
        out = large_pages(q.new_empty(B, L, H, D)).transpose(1, 2)
        if not _all_rows(tiles, q, common):
            out.zero_()
        lse = q.new_full((B, H, L, 1), -torch.inf, dtype=exact)
        deciding = []  # log-sum-exp of tiles with `Rows`
        scratch, shared = Scratch(), Shared(k, v)
        everyone = None if common is None else CommonKeys(common, q, k, v, scale)
        if everyone is not None:
            everyone.forward(q, sink)
        all_mild = mild is not None and bool(array_of(mild).all())  # known on a CPU alone
        for step in _steps(q, k, v, tiles):
            seen = None if isinstance(step.tile.rows, Rows) else everyone
            if not (step.parts or seen):
                continue
            query = step.near(step.rows(q), "q", scratch)
            sums = Sums(query, scratch, all_mild if all_mild or mild is None else step.rows(mild))
            if seen is not None:
                sums.start(*step.of(seen))
            elif sink is not None:
                sums.start(step.scores(sink) * LOG2E)
            for part in step.parts:
                view = View(part, step.tile.heads, step.batch, q, k)
                keys, values = view.take(k, v, shared, scratch)
                asking = view.fold(step.rows(turned) if part.turned and turned is not None else query)
                sums.add(asking, keys, values, view.bias(), scale=scale, shape=view.shape(query))
            if isinstance(step.tile.rows, slice):
                _, found_lse = sums.end(step.rows(out))
            else:
                found, found_lse = sums.end()
                step.put(out, found)
                valid = some_rows(step.tile.rows.valid, step.batch)[:, None, :, None]
                deciding.append(found_lse.masked_fill(~valid | (found_lse == -torch.inf), torch.inf))
                found_lse = torch.full_like(found_lse, torch.inf)
            step.put(lse, found_lse)
        if asked is not None:
            # nobody bounded their scores: what came of them may be infinite, and backward multiplies by it
            hidden = ~asked
            out.masked_fill_(hidden, 0)
            lse.masked_fill_(hidden, torch.inf)
        # rows that see nothing, or that another tile decides: +inf makes their weights zero
        lse.masked_fill_(lse == -torch.inf, torch.inf)
        given = [x for x in (sink, turned) if x is not None]
        ctx.save_for_backward(q, k, v, out, lse, *given, *deciding, *learned)
        ctx.tiles, ctx.scale, ctx.deciding, ctx.common = tiles, scale, len(deciding), common
        ctx.sinks, ctx.turns = sink is not None, turned is not None
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor):
        q, k, v, out, lse, *more = saved
        sink = more.pop(0) if ctx.sinks else None
        turned = more.pop(0) if ctx.turns else q
        deciding, learned = more[: ctx.deciding], more[ctx.deciding :]
        exact = torch.promote_types(q.dtype, torch.float32)
        dq = large_pages(torch.empty_like(q))
        if not _all_rows(ctx.tiles, q, ctx.common):
            dq.zero_()
        dk, dv = (large_pages(torch.empty_like(x, dtype=exact)).zero_() for x in (k, v))
        dsink = lse.new_zeros(q.shape[1])
        dturned = torch.zeros_like(turned) if ctx.turns else dq
        dlearned = [torch.zeros_like(x) for x in learned]
        scratch, shared, delta = Scratch(), Shared(k, v), _delta(grad, out, lse)
        shift, *deciding = (x * -LOG2E for x in (lse, *deciding))
        everyone = None if ctx.common is None else CommonKeys(ctx.common, q, k, v, ctx.scale)
        if everyone is not None:
            everyone.backward(q, grad, shift, delta, dk, dv)
        for step in _steps(q, k, v, ctx.tiles):
            seen = None if isinstance(step.tile.rows, Rows) else everyone
            if not (step.parts or seen):
                continue
            mine = deciding.pop(0) if isinstance(step.tile.rows, Rows) else step.rows(shift)
            query = step.near(step.rows(q), "q", scratch)
            asked = Asked(step.near(step.rows(grad), "grad", scratch).to(exact), query, step.rows(delta), mine)
            if sink is not None:
                weights = (step.scores(sink) * LOG2E + mine).exp2_()
                dsink[step.tile.heads] += (weights * asked.delta).sum((0, 2, 3))
            views = [View(part, step.tile.heads, step.batch, q, k) for part in step.parts]
            in_place = isinstance(step.tile.rows, slice) and dq.dtype == exact
            in_place = in_place and all(view.sees(step.rows(dq)) for view in views)
            dquery = step.rows(dq) if in_place else scratch("dq", query.shape, lse)
            if seen is None:
                dquery.zero_()
            else:
                step.begin(seen, dquery)
            for view in views:
                keys, values = view.take(k, v, shared, scratch)
                dkeys, dvalues = view.gradients(dk, dv, shared, scratch)
                asking, into = asked, dquery
                if view.part.turned:
                    asking, into = asked._replace(q=step.rows(turned)), scratch("dturned", query.shape, lse).zero_()
                dscores = partial_backward(
                    Asked(*(view.fold(x) for x in asking)),
                    keys,
                    values,
                    view.bias(),
                    scale=ctx.scale,
                    into=(view.fold(into), dkeys, dvalues),
                    shape=view.shape(query),
                    scratch=scratch,
                    fresh=view.fresh,
                )
                view.add(dk, dv, dkeys, dvalues)
                if view.part.turned:
                    step.rows(dturned).add_(into)
                if learned:
                    _learn(dlearned, learned, view, dscores.view(*view.shape(query), -1))
            if not in_place:
                step.put(dq, dquery)
        shared.add(dk, dv)
        of_sink, of_turned = None if sink is None else dsink.to(sink.dtype), dturned if ctx.turns else None
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, of_sink, of_turned, None, *dlearned


def _delta(grad: Tensor, out: Tensor, like: Float[Tensor, "B H L 1"]) -> Float[Tensor, "B H L 1"]:
    """-(grad · out), summed over D; some rows at a time, since a copy of either is as large as a gradient."""
    delta = torch.empty_like(like)
    for start in range(0, out.shape[2], 512):
        rows = slice(start, start + 512)
        torch.sum(grad[:, :, rows].to(like.dtype) * out[:, :, rows], -1, keepdim=True, out=delta[:, :, rows])
    return delta.neg_()


def _learn(total: list[Tensor], learned: Sequence[Tensor], view: View, dscores: Tensor) -> None:
    """Add the gradient that this part's bias hands to what it was computed from."""
    if view.part.learn is not None:
        view.part.learn(total, dscores, view.batch or slice(None))
        return
    with torch.enable_grad():
        bias = view.bias()
    if bias is None or not bias.requires_grad:
        return
    dbias = dscores.sum_to_size(bias.shape).to(bias.dtype)
    for into, share in zip(total, torch.autograd.grad(bias, learned, dbias, allow_unused=True)):
        if share is not None:
            into += share


class _Step(NamedTuple):
    """One tile for some batch rows."""

    tile: Tile
    batch: slice | None  # None: all

    @property
    def parts(self) -> Sequence[Part]:
        return self.tile.parts

    def rows(self, x: Shaped[Tensor, "B H L d"]) -> Shaped[Tensor, "b h n d"]:
        rows, x = self.tile.rows, some_rows(x, self.batch)
        return x[:, self.tile.heads, rows] if isinstance(rows, slice) else x.gather(2, self._index(rows, x))

    def near(self, x: Shaped[Tensor, "b h n d"], name: str, scratch: Scratch) -> Shaped[Tensor, "b h n d"]:
        """The same rows, side by side in memory where `Windows` are for them."""
        if not any(isinstance(part.keys, Windows) for part in self.parts) or x.is_contiguous():
            return x
        return scratch(name, x.shape, x).copy_(x)

    def of(self, everyone: CommonKeys) -> tuple[Tensor, Tensor]:
        """What sums of the tile's rows begin with."""
        assert isinstance(self.tile.rows, slice)
        return everyone.of(self.batch, self.tile.heads, self.tile.rows)

    def begin(self, everyone: CommonKeys, dquery: Float[Tensor, "b h n D"]) -> None:
        """Begin the gradient of the tile's queries."""
        assert isinstance(self.tile.rows, slice)
        everyone.dqueries(self.batch, self.tile.heads, self.tile.rows, dquery)

    def scores(self, sink: Float[Tensor, " H"]) -> Float[Tensor, "1 h 1 1"]:
        """Of the tile's heads, in float32 at least."""
        return sink[self.tile.heads].to(torch.promote_types(sink.dtype, torch.float32)).view(1, -1, 1, 1)

    def put(self, into: Float[Tensor, "B H L d"], values: Float[Tensor, "b H n d"]) -> None:
        """Set the tile's rows."""
        rows, into = self.tile.rows, some_rows(into, self.batch)
        if isinstance(rows, slice):
            into[:, self.tile.heads, rows] = values
            return
        index, valid = self._index(rows, into), some_rows(rows.valid, self.batch)[:, None, :, None]
        old = into.gather(2, index)
        into.scatter_(2, index, torch.where(valid, values.to(into.dtype), old))

    def _index(self, rows: Rows, x: Tensor) -> Tensor:
        return some_rows(rows.columns, self.batch)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _steps(q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile]) -> Iterator[_Step]:
    """Tiles, for as many batch rows at once as `SCORES` allows, or one where heads and batch do not merge in memory."""
    B, H = q.shape[:2]
    merges = all(x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (q, k, v))
    limit = scores_at_once(q)
    for tile in tiles:
        size = 1
        if B > 1 and merges and tile.heads == slice(None):
            size = max(1, limit // (H * _count(tile.rows, q.shape[2]) * _widest(tile, k.shape[2])))
        for start in range(0, B, size):
            yield _Step(tile, None if size >= B else slice(start, min(start + size, B)))


def _all_rows(tiles: Sequence[Tile], q: Tensor, common: Common | None) -> bool:
    """Whether each row of each head is written by a tile with a slice of rows."""
    H, L = q.shape[1:3]
    written = (
        len(range(H)[tile.heads]) * _count(tile.rows, L)
        for tile in tiles
        if (tile.parts or common) and isinstance(tile.rows, slice)
    )
    return sum(written) == H * L


def _count(rows: slice | Rows, columns: int) -> int:
    return len(range(columns)[rows]) if isinstance(rows, slice) else rows.columns.shape[1]


def _widest(tile: Tile, columns: int) -> int:
    return max((_width(part, columns) for part in tile.parts), default=1)


def _width(part: Part, columns: int) -> int:
    if isinstance(part.keys, Windows):
        return part.keys.width
    return len(range(columns)[part.keys]) if isinstance(part.keys, slice) else part.keys.shape[-1] * part.block
