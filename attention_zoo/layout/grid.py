"""A call's columns laid anew, in whole blocks: every document begins at the border of a block, and padding is gone.

What stands in consecutive columns from position 0 on need only be filled up (`filled`). Everything else (padding on the
left, holes, documents in one row, forgotten tokens) is moved: a block then holds the tokens of one block of positions
of one document, in their places, and rows end at the same block, so that the queries of a decoding step share one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, before, on_host, tensor_of
from attention_zoo.layout.layout import Layout


class Grid:
    """New columns for some tokens, `size` to a block.

    Attributes:
        size: columns of a block.
        columns: how many there are, whole blocks.
        source: [B|1, columns], which of the given columns each is; any one where it is none.
        held: [B|1, columns], whether it is one.
        stays: whether every token is where it was, though columns are no positions: documents of whole blocks.
        place: [B, S], the new column of each given one; `columns` at padding.
    """

    def __init__(self, layout: Layout, size: int, columns: int, place: Int[np.ndarray, "B S"] | None):
        """place: None: the given columns stay where they are."""
        self.layout, self.size, self.columns = layout, size, columns
        B, S = layout.valid.shape
        self.moved = place is not None
        self.stays = place is not None and columns == S and bool((place == np.arange(S)).all())
        if place is None:
            column = np.arange(columns)[None]
            self.place = np.broadcast_to(column[:, :S], (B, S))
            self.source, self.held = column.clip(max=S - 1), column < S
        else:
            self.place = place
            source = np.full((B, columns + 1), S)
            np.put_along_axis(source, place, np.broadcast_to(np.arange(S), (B, S)), 1)
            self.held = source[:, :-1] < S
            self.source = source[:, :-1].clip(max=S - 1)

    @staticmethod
    def filled(layout: Layout, size: int) -> Grid:
        """Columns as they are, filled up to whole blocks."""
        S = layout.valid.shape[1]
        return layout.plan(("filled", size), lambda: Grid(layout, size, S + -S % size, None))

    @staticmethod
    def of(layout: Layout, size: int) -> Grid:
        """Columns moved to where their positions lie in their documents' blocks."""
        return layout.plan(("grid", size), lambda: Grid(layout, size, *_places(layout.host, size)))

    @cached_property
    def keys(self) -> Layout:
        """What the new columns are."""
        given = self.layout.host
        if self.moved:
            host = given.take(self.source).only(self.held)
        else:
            more = ((0, 0), (0, self.columns - given.valid.shape[1]))
            host = Host(*(np.pad(field, more) for field in given))  # filled with padding
        return Layout.known(host, self.layout.valid.device)

    def first(self, queries: int) -> int:
        """The first column of the first block that holds one of the last so many tokens."""
        place = self.place[:, self.place.shape[1] - queries :]
        return min(int(place.min()), self.columns - 1) // self.size * self.size

    @cached_property
    def row(self) -> Int[np.ndarray, "B n"]:
        """Which block of its document each block is; -1 for an empty one."""
        return self.of_block(self.keys.host.position // self.size)

    @cached_property
    def document(self) -> Int[np.ndarray, "B n"]:
        """Which document each block belongs to; -1 for an empty one."""
        return self.of_block(self.keys.host.document)

    def of_block(self, field: Int[np.ndarray, "B columns"]) -> Int[np.ndarray, "B n"]:
        """The largest value among the tokens of each block; -1 where there are none."""
        known = np.where(self.keys.host.valid, field, -1)
        return known.reshape(len(known), -1, self.size).max(-1)

    @cached_property
    def _way(self) -> Way:
        return Way.of(self.source, self.place.clip(max=self.columns - 1), self.place >= self.columns, self.layout)

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, S, D] in the new columns; anything where there is no token, and from there comes no gradient."""
        if self.stays:
            return x
        if self.moved:
            return self._way.go(x, by_head=True)
        more = self.columns - x.shape[2]
        return _Filled.apply(x, more) if more else x


class Way(NamedTuple):
    """Columns that are moved, each to one place at most, so that its gradient comes from there: a copy, too.

    Fields:
        there: [B, n], from which of the given columns each new one is taken.
        back: [B, S], where each of the given ones went.
        gone: [B, 1, S, 1], which of them went nowhere; None: none did.
    """

    there: Tensor
    back: Tensor
    gone: Tensor | None

    @staticmethod
    def of(there: Array, back: Array, gone: Array, like: Layout) -> Way:
        device = like.valid.device
        return Way(tensor_of(there, device), tensor_of(back, device), mask_of(gone, device) if gone.any() else None)

    def go(self, x: Float[Tensor, "B H S D"], *, by_head: bool = False) -> Float[Tensor, "B H n D"]:
        """Only what was given goes there, and nobody may ask for the gradient of anything else.

        Args:
            by_head: whether columns of a head are to be side by side in memory, not heads of a column.
        """
        if not copies_rows(x):
            return taken(x, self.there)
        found: Tensor = _Moved.apply(x, self, by_head)
        return found


def copies_rows(x: Tensor) -> bool:
    """Whether rows are copied one by one: on a CPU, where gathering takes each number by itself, five times as long."""
    return on_host(x.device)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way, by_head: bool) -> Tensor:
        ctx.way = way
        return _rows(x, way.there, by_head)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        there, back, gone = ctx.way
        dx: Tensor = _Moved.apply(grad, Way(back, there, None), False)
        return dx if gone is None else dx.masked_fill(gone, 0), None, None


def _rows(x: Float[Tensor, "B H S D"], columns: Int[Tensor, "B n"], by_head: bool) -> Float[Tensor, "B H n D"]:
    (B, H, _, D), n = x.shape, columns.shape[1]
    out = x.new_empty(B, H, n, D) if by_head else x.new_empty(B, n, H, D)
    for row, index, into in zip(x if by_head else x.transpose(1, 2), columns, out):
        torch.index_select(row, int(by_head), index, out=into)
    return out if by_head else out.transpose(1, 2)


class _Filled(torch.autograd.Function):
    """Columns behind the given ones. The gradient is a view: a copy would be as large as the keys are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: int) -> Tensor:
        ctx.columns = x.shape[2]
        return torch.nn.functional.pad(x, (0, 0, 0, more))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, :, : ctx.columns], None


def _places(host: Host, size: int) -> tuple[int, Int[np.ndarray, "B S"]]:
    """How many columns there are, and the one of each token."""
    row = host.position // size
    earlier = before(host.valid)
    at = earlier.clip(min=0)
    follows = (earlier >= 0) & (np.take_along_axis(host.document, at, 1) == host.document)
    step = np.where(follows, row - np.take_along_axis(row, at, 1), 1) * host.valid
    index = step.cumsum(1) - 1
    # rows end together: then the queries of a decoding step share one block, however long their prefixes are
    index = index + (index.max(initial=-1) - index.max(1, keepdims=True, initial=-1))
    columns = (max(0, int(index.max(initial=0))) + 1) * size
    return columns, np.where(host.valid, index * size + host.position % size, columns)


def taken(x: Tensor, columns: Int[Tensor, "B n"]) -> Tensor:
    """Each batch row's own columns of [B, H, S, D]."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def with_taken(x: Float[Tensor, "B H S D"], columns: Int[Tensor, "B n"]) -> Float[Tensor, "B H S+n D"]:
    """All columns, and some of them again behind all."""
    found: Tensor = _WithTaken.apply(x, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return found


class _WithTaken(torch.autograd.Function):
    """What both places get is added in one copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return torch.cat([x, x.gather(2, index)], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        own, behind = grad.split([grad.shape[2] - index.shape[2], index.shape[2]], 2)
        return own.scatter_add(2, index, behind), None


def is_wasteful(grid: Grid, queries: int) -> bool:
    """Whether most columns would be empty: of documents or queries much shorter than a block, or with many holes."""
    given, used = grid.place.shape[1], grid.columns - grid.first(queries)
    return grid.columns > 2 * (given + grid.size) or used > 2 * (queries + grid.size)


def mask_of(mask: Array, device: torch.device) -> Bool[Tensor, "B 1 n 1"]:
    """Rows of [B, H, n, D] that the mask [B, n] keeps."""
    return tensor_of(mask, device)[:, None, :, None]
