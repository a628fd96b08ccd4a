"""Pieces of segments, cut into tiles that fit the cache, and the scores of one: what segments.py goes through.

A tile is one piece, in parts: the last rows of a head first, each over the columns up to its last row's own. Or it is
several small pieces, or heads of one, in one part. Its rows stand by heads, then pieces, [H·n, R, D]; where they meet
distances by heads alone, [H, n·R, D], so that the table of a head serves all pieces at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.ops.relative.chunks import ROWS, TILE, falling
from attention_zoo.ops.softmax.partial import LOG2E, Scratch

ALONE = 1 << 17
"""Scores of a head's part that are enough for products and passes of its own, on a CPU: what it needs stays in the
cache. Fewer go together, up to `TILE` of them, since starting them costs."""

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


class Table:
    """Keys, or values, as [B · T] rows: those of slots first in each of the B, where they are given apart."""

    def __init__(self, x: Float[Tensor, "B S H D"], slots: Float[Tensor, "B G H D"] | None):
        self.rest, self.slots = x, slots
        self.front = 0 if slots is None else slots.shape[1]
        self.size = self.front + x.shape[1]

    @cached_property
    def whole(self) -> Float[Tensor, "BT H D"]:
        return (self.rest if self.slots is None else torch.cat([self.slots, self.rest], 1)).flatten(0, 1)

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


class Work:
    """What all tiles of a pass share: the table of distances, and scratch."""

    def __init__(self, r: Tensor, u: Tensor, w: Tensor, scale: float, dtype: torch.dtype):
        exact = torch.promote_types(dtype, torch.float32)
        self.table, self.scale, self.scratch = falling(r, exact), scale, Scratch()
        self.features = self.table.mT.contiguous()  # products with it are a fifth faster
        self.added = tuple((x.to(exact) * scale)[:, None, None] for x in (u, w))
        self.bounds: dict[int, Tensor] = {}

    def like(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """Scratch of this shape; or of so many numbers in the last dimension."""
        return self.scratch(name, tuple(x.shape) if width is None else (*x.shape[:-1], width), self.table)

    def copied(self, x: Float[Tensor, "H n R d"], name: str) -> Float[Tensor, "Hn R d"]:
        return self.like(x, name).copy_(x).flatten(0, 1)

    def sides(self, query: Float[Tensor, "H n R D"]) -> tuple[Float[Tensor, "Hn R D"], Float[Tensor, "H nR D"]]:
        """scale · what meets keys, and what meets distances."""
        to_keys, to_distances = (
            torch.add(more, query, alpha=self.scale, out=self.like(query, name))
            for name, more in zip(("to_keys", "to_distances"), self.added)
        )
        return to_keys.flatten(0, 1), to_distances.flatten(1, 2)

    def product(self, part: Part) -> Float[Tensor, "*h nl s_and_one"]:
        """Scratch: a part's rows with the distances of all columns, and a spare one."""
        return self.scratch("product", part.size, self.table)

    def exponents(
        self,
        part: Part,
        asked: tuple[Tensor, Tensor],
        keys: Float[Tensor, "*hn s D"],
        shift: Float[Tensor, "*h nl 1"] | None,
    ) -> Float[Tensor, "*hn l s"]:
        """log2(e) · scores + shift, -inf where a key is hidden; in the scratch.

        They stand where the product with distances does, in its shifted view, and the product with keys is added there.
        """
        to_keys, to_distances = map(part.asked, asked)
        product, s = self.product(part), part.columns
        if shift is not None:
            product.copy_(shift)
        multiply(product, to_distances, part.features(self.features), beta=0 if shift is None else 1, alpha=LOG2E)
        found = part.shifted(product)
        multiply(found, to_keys, keys.mT, alpha=LOG2E)
        if part.rows > 1:
            # whose row is later; a minimum is the fastest way to write it
            last = found[..., s - part.rows :]
            torch.minimum(last, self._past(part.rows), out=last)
        if part.missing is not None:
            found.masked_fill_(part.missing[..., :s], -torch.inf)
        return found

    def _past(self, rows: int) -> Float[Tensor, "l l"]:
        """-inf where the column is later than the row, +inf elsewhere."""
        if rows not in self.bounds:
            later = torch.ones(rows, rows, dtype=torch.bool, device=self.table.device).triu_(1)
            self.bounds[rows] = self.table.new_full((rows, rows), torch.inf).masked_fill_(later, -torch.inf)
        return self.bounds[rows]


class Part:
    """Rows of a tile that are computed at once: all of it; or of one head, or some, those from start to stop.

    Fields:
        rows, columns: of the scores, l and s.
        covers_all: whether its columns are all that the tile has.
        missing: of the tile, as it is broadcast to the scores.
        size: of the product with distances.
    """

    def __init__(self, tile: Tile, heads: int | slice | None = None, start: int = 0, stop: int | None = None):
        stop = tile.R if stop is None else stop
        self.rows, self.columns, self.covers_all = stop - start, tile.W - tile.R + stop, stop == tile.R
        self.missing, self.heads = tile.missing, heads
        self.at = None if heads is None else (heads, slice(start, stop))
        self.until = None if heads is None else (heads, slice(self.columns))
        n, lead = tile.n if heads is None else 1, [tile.H]
        if heads is not None:
            lead = [] if isinstance(heads, int) else [heads.stop - heads.start]
        self.size = (*lead, n * self.rows, self.columns + 1)
        self.blocks = tuple(n * count for count in lead)

    def asked(self, x: Float[Tensor, "N R d"]) -> Float[Tensor, "*n l d"]:
        return x if self.at is None else x[self.at]

    def seen(self, x: Float[Tensor, "Hn W D"]) -> Float[Tensor, "*hn s D"]:
        return x if self.until is None else x[self.until]

    def distances(self, table: Float[Tensor, "H m D"]) -> Float[Tensor, "*h s_and_one D"]:
        """Of the oldest key seen from the last row, down to 0, and the spare one."""
        low = table.shape[1] - self.columns - 1
        return table[:, low:] if self.heads is None else table[self.heads, low:]

    def features(self, table: Float[Tensor, "H D m"]) -> Float[Tensor, "*h D s_and_one"]:
        """The same of the table whose features come first."""
        low = table.shape[2] - self.columns - 1
        return (table if self.heads is None else table[self.heads])[..., low:]

    def shifted(self, product: Float[Tensor, "*h nl s_and_one"]) -> Float[Tensor, "*hn l s"]:
        """The view of `chunks.Shift`: distances where their keys are."""
        l, s = self.rows, self.columns
        strides = (s, 1) if not self.blocks else (l * (s + 1), s, 1)
        return product.as_strided((*self.blocks, l, s), strides, l - 1)

    def rest_cleared(self, product: Float[Tensor, "*h nl s_and_one"]) -> Float[Tensor, "*h nl s_and_one"]:
        """The same, with zeros where that view does not look."""
        blocks = product.view(*self.blocks, -1)
        blocks[..., : self.rows - 1] = 0
        blocks[..., -1:] = 0
        return product


class Tile:
    """One piece in parts, or several in one.

    Args:
        heads: those of each part; None: all.
        rows: of each part, at most.
    """

    def __init__(self, group: Pieces, pieces: slice, H: int, heads: list[int] | list[slice] | None, rows: int):
        self.at, self.keys, self.own = group.rows[pieces], group.keys[pieces], group.own
        self.places, self.H = group.places[pieces], H
        self.empty, self.absent, self.far = (
            None if x is None else x[pieces] for x in (group.empty, group.missing, group.far)
        )
        self.runs = None if group.runs is None else group.runs[pieces]
        (self.n, self.R), self.W = self.at.shape, self.keys.shape[1]
        first = () if group.starts is None else group.starts[pieces]
        self.alone = slice(first[0], first[0] + self.R) if len(first) == 1 else None
        self.missing = None
        if self.absent is not None:
            self.missing = self.absent[0] if self.n == 1 else self.absent.repeat(H, 1, 1)
        if heads is None:
            self.parts = [Part(self)]
        else:
            starts = range(0, self.R, rows)[::-1]
            self.parts = [Part(self, some, start, min(start + rows, self.R)) for some in heads for start in starts]

    def rows_of(self, x: Float[Tensor, "B L H d"]) -> Float[Tensor, "H n R d"]:
        """The queries' rows, a view where it can be."""
        flat = x.flatten(0, 1)
        return (flat[None, self.alone] if self.alone is not None else flat[self.at]).permute(2, 0, 1, 3)

    def shift(self, lse: Float[Tensor, "BL_and_spare H 1"], work: Work) -> Float[Tensor, "H nR 1"]:
        """What makes weights of exponents: minus the log-sum-exp; -inf where there is no query."""
        found = work.copied(self.rows_of(lse[None]), "shift").neg_().view(self.H, self.n, self.R, 1)
        return (found if self.empty is None else found.masked_fill_(self.empty, -torch.inf)).flatten(1, 2)

    def keys_of(self, table: Table, name: str, work: Work) -> Float[Tensor, "Hn W D"]:
        """The keys' rows, in the scratch."""
        if self.runs is None or self.absent is not None or len(self.runs) > 1:
            found = table.whole.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape)
            return work.copied(found.permute(2, 0, 1, 3), name)
        into = work.scratch(name, (self.H, self.W, table.rest.shape[3]), work.table)
        for start, at, count in self.runs[0]:
            into[:, at : at + count] = table.run(start, count).transpose(0, 1)
        return into

    def put(self, into: Float[Tensor, "BL H D"], found: Float[Tensor, "Hn R D"]) -> None:
        """Into the rows of the queries."""
        by_rows = found.unflatten(0, (self.H, self.n)).permute(1, 2, 0, 3)
        if self.alone is not None:
            into[self.alone] = by_rows[0]
        else:
            into[self.places] = by_rows.to(into.dtype)

    def add(self, every: Tensor, own: Tensor | None, found: Float[Tensor, "Hn W D"]) -> None:
        """To the gradients of the keys, [BT, H, D]: all, and those of the own segment."""
        found, first = found.unflatten(0, (self.H, self.n)).permute(1, 2, 0, 3), self.W - self.own
        if self.runs is None:
            found = found if self.absent is None else found.masked_fill(self.absent.transpose(1, 2)[..., None], 0)
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


def tiles(plan: PiecePlan, q: Float[Tensor, "B L H D"]) -> Iterator[Tile]:
    """The largest pieces first, so that scratch never grows."""
    H, large = q.shape[2], plan.together or q.is_cuda
    limit = TILE["cuda"] if large else TILE["cpu"]
    for group in sorted(plan.groups, key=lambda group: -group.rows.shape[1] * group.keys.shape[1]):
        n, R = group.rows.shape
        rows = min(R, limit if plan.together else ROWS)
        scores = rows * group.keys.shape[1]
        together = min(H, max(1, limit // scores)) if large or scores < ALONE else 1
        together = -(-H // -(-H // together))  # alike many in each part
        heads: list[int] | list[slice] | None = None
        if together == 1 < H:
            heads = list(range(H))
        elif together < H or rows < R:
            heads = [slice(head, min(head + together, H)) for head in range(0, H, together)]
        count = max(1, limit // (scores * H)) if heads is None else 1
        for piece in range(0, n, count):
            yield Tile(group, slice(piece, piece + count), H, heads, rows)


def multiply(
    into: Float[Tensor, "*n a b"],
    left: Float[Tensor, "*n a c"],
    right: Float[Tensor, "*n c b"],
    *,
    beta: int = 1,
    alpha: float = 1,
) -> Tensor:
    """into = beta · into + alpha · left · right, of matrices or several."""
    return (into.addmm_ if into.ndim == 2 else into.baddbmm_)(left, right, beta=beta, alpha=alpha)


def _add_rows(into: Float[Tensor, "BT H D"], rows: Int[Tensor, "n W"], found: Float[Tensor, "n W H D"]) -> None:
    """In a fixed order, which `index_add_` has on a CPU alone."""
    if into.is_cuda:
        into.index_put_((rows,), found, accumulate=True)
    else:
        into.index_add_(0, rows.flatten(), found.flatten(0, 1))
