"""The executor: run a list of tiles, each some query rows against some keys, and recompute in backward.

A tile's parts see disjoint keys and are merged exactly (ops/partial.py); what is saved for backward is q, k, v, the
output and one log-sum-exp per row, so memory is O(L·D) whatever the pattern. Gradients of keys and values accumulate in
place: plain autograd through `k[:, :, a:b]` would allocate a full-size zero tensor per tile, which is quadratic
(pytorch#9701).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attention_zoo.ops.function import exact, once
from attention_zoo.ops.partial import Scratch, Sums, partial_backward

Bias = Callable[[slice], Tensor | None]

SCORES = {"cpu": 1 << 19}
"""Scores that a step should hold, over batch and heads: near the cache on a CPU. See `scores_at_once`."""
_SCORES_GPU = 1 << 26  # a few steps should fill the device


def scores_at_once(x: Tensor) -> int:
    """How many scores a step on this tensor's device should hold. Two copies of them exist in backward."""
    return SCORES.get(x.device.type, _SCORES_GPU)


class Part(NamedTuple):
    """Keys that one tile sees, with their bias.

    Fields:
        keys: which columns of k and v. A slice (with any step) is a view without a copy; int [n] is the same for all
            batch rows; int [B, n] is each row's own, and is gathered once for all tiles that hold the same tensor;
            int [B, h, g, m] is the own of each of the tile's heads for each of g equal groups of the tile's rows, as
            `blocks_in` counts blocks of `block` columns: n = m · block. k and v must then be contiguous; gathering long
            contiguous runs is what makes this fast (20 times, measured on CPU).
        bias: called with the batch rows that it is needed for, forward and again backward; -inf unseen, or None.
            [b|1, H|1, rows|1, n] for b batch rows, of all heads; with groups, of the tile's,
            [b|1, h|1, g, rows / g|1, n].
        block: columns per entry of per-head `keys`.
    """

    keys: slice | Tensor
    bias: Bias
    block: int = 1


class Rows(NamedTuple):
    """Each batch row's own query rows; where `valid` is False it has fewer, and the entry is ignored."""

    columns: Int[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]


class Tile(NamedTuple):
    """Query rows and the parts that they see.

    Every row of every head belongs to at most one tile with a slice of rows (with any step), and to at most one with
    `Rows`, which then decides alone. Rows in none yield zeros.

    Fields:
        heads: which query heads; a group that shares a key head stays together.
    """

    rows: slice | Rows
    parts: Sequence[Part]
    heads: slice = slice(None)


def blocks_in(
    k: Float[Tensor, "B K S D"], heads: int, links: Int[Tensor, "#B H R m"], block: int
) -> Int[Tensor, "B H R m"]:
    """Which blocks of all of k, in the order of memory, these blocks of each head's columns are.

    Args:
        heads: of the queries, H; consecutive ones share a key head.
    """
    B, K, S, _ = k.shape
    if S % block:
        raise ValueError(f"S must be whole blocks of {block}, got {S}")
    first = torch.arange(B * K, device=k.device).view(B, K) * (S // block)
    return links + first.repeat_interleave(heads // K, 1)[:, :, None, None]


def run_tiles(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    tiles: Sequence[Tile],
    *,
    scale: float,
    learned: Sequence[Tensor] = (),
    mild: Bool[Tensor, "B H L 1"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """Attention along the tiles.

    Args:
        learned: tensors that the biases depend on and that want a gradient.
        mild: rows whose scores are known to be small (ops/mild.py); None: none is.
    """
    tiles = sorted(tiles, key=lambda tile: isinstance(tile.rows, Rows))
    return _Tiles.apply(q, k, v, tiles, scale, mild, *learned)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @exact
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        scale: float,
        mild: Tensor | None,
        *learned: Tensor,
    ) -> Tensor:
        B, H, L, D = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        # laid out as the next projection wants it: merging the heads is then free
        out = q.new_empty(B, L, H, D).transpose(1, 2)
        if not _all_rows(tiles, q):
            out.zero_()
        lse = q.new_full((B, H, L, 1), -torch.inf, dtype=exact)
        deciding = []  # log-sum-exp of tiles with `Rows`
        scratch, shared = Scratch(), _Shared(k, v)
        all_mild = mild is not None and bool(mild.all())
        for step in _steps(q, k, v, tiles):
            if not step.parts:
                continue
            query = step.rows(q)
            sums = Sums(query, scratch, all_mild if all_mild or mild is None else step.rows(mild))
            for part in step.parts:
                view = _View(part, step, q, k)
                keys, values = view.take(k, v, shared, scratch)
                sums.add(view.split(query), keys, values, view.bias(), scale=scale)
            if isinstance(step.tile.rows, slice):
                _, found_lse = sums.end(step.rows(out))
            else:
                found, found_lse = sums.end()
                step.put(out, found)
                valid = _some(step.tile.rows.valid, step.batch)[:, None, :, None]
                deciding.append(found_lse.masked_fill(~valid | (found_lse == -torch.inf), torch.inf))
                found_lse = torch.full_like(found_lse, torch.inf)
            step.put(lse, found_lse)
        # rows that see nothing, or that another tile decides: +inf makes their weights zero
        lse.masked_fill_(lse == -torch.inf, torch.inf)
        ctx.save_for_backward(q, k, v, out, lse, *deciding, *learned)
        ctx.tiles, ctx.scale, ctx.deciding = tiles, scale, len(deciding)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor):
        q, k, v, out, lse, *more = saved
        deciding, learned = iter(more[: ctx.deciding]), more[ctx.deciding :]
        exact = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q) if _all_rows(ctx.tiles, q) else torch.zeros_like(q)
        dk, dv = (torch.zeros_like(x, dtype=exact) for x in (k, v))
        dlearned = [torch.zeros_like(x) for x in learned]
        scratch, shared, delta = Scratch(), _Shared(k, v), _delta(grad, out, lse)
        for step in _steps(q, k, v, ctx.tiles):
            if not step.parts:
                continue
            query, dout = step.rows(q), step.rows(grad).to(exact)
            mine = next(deciding) if isinstance(step.tile.rows, Rows) else step.rows(lse)
            in_place = isinstance(step.tile.rows, slice) and dq.dtype == exact and step.rows(dq).is_contiguous()
            dquery = (step.rows(dq) if in_place else scratch("dq", query.shape, lse)).zero_()
            for part in step.parts:
                view = _View(part, step, q, k)
                keys, values = view.take(k, v, shared, scratch)
                dkeys, dvalues = view.gradients(dk, dv, shared, scratch)
                bias = view.bias()
                dscores = partial_backward(
                    view.split(dout),
                    view.split(query),
                    keys,
                    values,
                    view.split(step.rows(delta)),
                    view.split(mine),
                    bias,
                    scale=ctx.scale,
                    into=(view.split(dquery), dkeys, dvalues),
                    scratch=scratch,
                    fresh=view.fresh,
                )
                view.add(dk, dv, dkeys, dvalues)
                if learned:
                    _learn(dlearned, learned, view, dscores)
            if not in_place:
                step.put(dq, dquery)
        shared.add(dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, *dlearned


def _delta(grad: Tensor, out: Tensor, like: Float[Tensor, "B H L 1"]) -> Float[Tensor, "B H L 1"]:
    """grad · out, summed over D; some rows at a time, since a copy of either is as large as a gradient."""
    delta = torch.empty_like(like)
    for start in range(0, out.shape[2], 512):
        rows = slice(start, start + 512)
        torch.sum(grad[:, :, rows].to(like.dtype) * out[:, :, rows], -1, keepdim=True, out=delta[:, :, rows])
    return delta


def _learn(total: list[Tensor], learned: Sequence[Tensor], view: _View, dscores: Tensor) -> None:
    """Add the gradient that this part's bias hands to what it was computed from."""
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

    def rows(self, x: Shaped[Tensor, "B H L d"]) -> Shaped[Tensor, "b H n d"]:
        rows, x = self.tile.rows, _some(x, self.batch)
        return x[:, self.tile.heads, rows] if isinstance(rows, slice) else x.gather(2, self._index(rows, x))

    def put(self, into: Float[Tensor, "B H L d"], values: Float[Tensor, "b H n d"]) -> None:
        """Set the tile's rows."""
        rows, into = self.tile.rows, _some(into, self.batch)
        if isinstance(rows, slice):
            into[:, self.tile.heads, rows] = values
            return
        index, valid = self._index(rows, into), _some(rows.valid, self.batch)[:, None, :, None]
        old = into.gather(2, index)
        into.scatter_(2, index, torch.where(valid, values.to(into.dtype), old))

    def _index(self, rows: Rows, x: Tensor) -> Tensor:
        return _some(rows.columns, self.batch)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


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


def _all_rows(tiles: Sequence[Tile], q: Tensor) -> bool:
    """Whether each row of each head is written by a tile with a slice of rows."""
    H, L = q.shape[1:3]
    written = (
        len(range(H)[tile.heads]) * _count(tile.rows, L)
        for tile in tiles
        if tile.parts and isinstance(tile.rows, slice)
    )
    return sum(written) == H * L


def _some(x: Tensor, batch: slice | None) -> Tensor:
    return x if batch is None else x[batch]


def _count(rows: slice | Rows, columns: int) -> int:
    return len(range(columns)[rows]) if isinstance(rows, slice) else rows.columns.shape[1]


def _widest(tile: Tile, columns: int) -> int:
    return max((_width(part, columns) for part in tile.parts), default=1)


def _width(part: Part, columns: int) -> int:
    return len(range(columns)[part.keys]) if isinstance(part.keys, slice) else part.keys.shape[-1] * part.block


class _View:
    """How one part's operands look to `partial`: groups of rows with keys of their own become extra heads."""

    def __init__(self, part: Part, step: _Step, q: Tensor, k: Tensor):
        self.part, self.keys, self.block, self.batch = part, part.keys, part.block, step.batch
        self.rows_heads, first, last = step.tile.heads, *step.tile.heads.indices(q.shape[1])[:2]
        self.heads, group = last - first, q.shape[1] // k.shape[1]
        self.key_heads = slice(first // group, last // group)
        # 0: all heads and rows see the same keys
        self.groups = part.keys.shape[2] if isinstance(part.keys, Tensor) and part.keys.ndim == 4 else 0

    def split(self, x: Tensor) -> Tensor:
        """[B, H, rows, D] -> [B, H·g, rows / g, D]."""
        if not self.groups:
            return x
        b, heads, rows, width = x.shape
        return x.reshape(b, heads * self.groups, rows // self.groups, width)

    def bias(self) -> Tensor | None:
        """[b|1, H|1, rows|1, n], or with groups [b|1, H·g, rows / g|1, n]."""
        bias = self.part.bias(self.batch or slice(None))
        if bias is None:
            return None
        if self.groups:
            return bias.expand(-1, self.heads, -1, -1, -1).flatten(1, 2)
        return bias[:, self.rows_heads] if bias.shape[1] > 1 else bias

    def _mine(self, x: Tensor) -> Tensor:
        """The batch rows and key heads that the step is about."""
        return _some(x, self.batch)[:, self.key_heads]

    def take(self, k: Tensor, v: Tensor, shared: _Shared, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """The part's columns of k and v, [b, K, n, D] or [b, H·g, n, D]."""
        keys = self.keys
        if isinstance(keys, Tensor) and keys.ndim == 4:
            return self._gather(k, "k", scratch), self._gather(v, "v", scratch)
        if isinstance(keys, Tensor) and keys.ndim == 2:
            k, v = (self._mine(x) for x in shared.take(keys))
            return k, v
        k, v = self._mine(k), self._mine(v)
        if isinstance(keys, slice):
            return k[:, :, keys], v[:, :, keys]
        return k.index_select(2, keys), v.index_select(2, keys)

    def gradients(self, dk: Tensor, dv: Tensor, shared: _Shared, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Where the gradients of what was taken go: the real place, or one of their own from which `add` adds them."""
        keys = self.keys
        if isinstance(keys, Tensor) and keys.ndim == 2:
            dk, dv = (self._mine(x) for x in shared.gradients(keys, dk))
            return dk, dv
        dk, dv = self._mine(dk), self._mine(dv)
        if isinstance(keys, slice):
            return dk[:, :, keys], dv[:, :, keys]
        b, K, _, D = dk.shape
        shape = (b, K, len(keys), D) if keys.ndim == 1 else (b, self.heads * self.groups, self._width, D)
        return scratch("dk", shape, dk), scratch("dv", shape, dv)

    @property
    def fresh(self) -> bool:
        """Whether the gradients have a place of their own."""
        return isinstance(self.keys, Tensor) and self.keys.ndim != 2

    def add(self, dk: Tensor, dv: Tensor, dkeys: Tensor, dvalues: Tensor) -> None:
        if not self.fresh:
            return
        assert isinstance(self.keys, Tensor)
        for into, grad in ((dk, dkeys), (dv, dvalues)):
            if self.keys.ndim == 1:
                self._mine(into).index_add_(2, self.keys, grad)
            else:
                blocks = self._blocks(into)
                blocks.index_add_(0, self._index(), grad.view(-1, blocks.shape[1]))

    def _gather(self, x: Tensor, name: str, scratch: Scratch) -> Tensor:
        blocks, index = self._blocks(x), self._index()
        taken = scratch(name, (len(index), blocks.shape[1]), x)
        torch.index_select(blocks, 0, index, out=taken)
        return taken.view(-1, self.heads * self.groups, self._width, x.shape[3])

    @property
    def _width(self) -> int:
        assert isinstance(self.keys, Tensor)
        return self.keys.shape[-1] * self.block

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, K, S, D] -> [B·K·S / block, block·D], a view."""
        return x.view(-1, self.block * x.shape[3])

    def _index(self) -> Tensor:
        """Rows of `_blocks(x)` that the part takes, flat [b·H·g·m]."""
        assert isinstance(self.keys, Tensor)
        return _some(self.keys, self.batch).flatten()


class _Shared:
    """Columns of k and v that many tiles take, gathered once, and the sums of their gradients."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def take(self, keys: Int[Tensor, "B n"]) -> tuple[Tensor, Tensor]:
        if id(keys) not in self._taken:
            self._taken[id(keys)] = _gather(self.k, keys), _gather(self.v, keys)
        return self._taken[id(keys)]

    def gradients(self, keys: Int[Tensor, "B n"], like: Tensor) -> tuple[Tensor, Tensor]:
        if id(keys) not in self._sums:
            k, v = self.take(keys)
            self._sums[id(keys)] = keys, (torch.zeros_like(k, dtype=like.dtype), torch.zeros_like(v, dtype=like.dtype))
        return self._sums[id(keys)][1]

    def add(self, dk: Tensor, dv: Tensor) -> None:
        for keys, sums in self._sums.values():
            for into, grad in zip((dk, dv), sums):
                into.scatter_add_(2, keys[:, None, :, None].expand_as(grad), grad)


def _gather(x: Tensor, keys: Int[Tensor, "B n"]) -> Tensor:
    return x.gather(2, keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
