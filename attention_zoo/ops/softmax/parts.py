"""Parts: some of the keys, and how they and the rows that see them look to batched products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.softmax.partial import Scratch, fold

Bias = Callable[[slice], Tensor | None]
Learn = Callable[[Sequence[Tensor], Tensor, slice], None]


class Windows(NamedTuple):
    """Equal windows of consecutive columns at equal distances, which may overlap: one for each of as many groups of
    rows. A view without a copy.

    Fields:
        first: where the first begins.
        width: columns of each.
        step: from the beginning of one to that of the next, at most `width`.
        blocks: of rows, a window for each.
    """

    first: int
    width: int
    step: int
    blocks: int

    def of(self, x: Float[Tensor, "S D"], start: int = 0, stop: int | None = None) -> Float[Tensor, "blocks n D"]:
        """Columns `start` to `stop` of each window."""
        stop, (row, column) = self.width if stop is None else stop, x.stride()
        shape, strides = (self.blocks, stop - start, x.shape[1]), (self.step * row, row, column)
        return x.as_strided(shape, strides, x.storage_offset() + (self.first + start) * row)

    def near(self, x: Float[Tensor, "S D"], place: Callable[[tuple[int, int]], Tensor]) -> Float[Tensor, "blocks n D"]:
        """All of each window, with columns side by side in memory: products of few rows take half as long again where
        heads lie between them. What is read from there is copied to a place of that shape."""
        if x.stride(0) == x.shape[1]:
            return self.of(x)
        some = x[self.first : self.first + self.step * (self.blocks - 1) + self.width]
        return self._replace(first=0).of(place((len(some), x.shape[1])).copy_(some))

    def add(self, into: Float[Tensor, "S D"], grad: Float[Tensor, "blocks n D"]) -> None:
        """Add what belongs to the columns of each window: piece by piece, so that no two are one memory."""
        for start in range(0, self.width, self.step):
            stop = min(start + self.step, self.width)
            self.of(into, start, stop).add_(grad[:, start:stop])


class Part(NamedTuple):
    """Keys that one tile sees, with their bias.

    Fields:
        keys: which columns of k and v. A slice (with any step) is a view without a copy; int [n] is the same for all
            batch rows; int [B, n] is each row's own, and is gathered once for all tiles that hold the same tensor;
            int [B, h, g, m] is the own of each of the tile's heads for each of g equal groups of the tile's rows, as
            `blocks_in` counts blocks of `block` columns: n = m · block. k and v must then be contiguous; gathering long
            contiguous runs is what makes this fast (20 times, measured on CPU). `Windows` are for tiles of one head and
            steps of one batch row, g = blocks of them.
        bias: called with the batch rows that it is needed for, forward and again backward; -inf unseen, or None.
            [b|1, H|1, rows|1, n] for b batch rows, of all heads; with groups, of the tile's,
            [b|1, h|1, g, rows / g|1, n].
        block: columns per entry of per-head `keys`.
        learn: (sums, gradient [b, h, rows, n] of the scores of the tile's heads, batch rows) adds to the sums, one for
            each learned tensor, what the bias hands on: for a bias that is cut out of one. None: autograd finds it.
        turned: whether rows, of a slice, ask with their other queries (`run_tiles`).
    """

    keys: slice | Tensor | Windows
    bias: Bias
    block: int = 1
    learn: Learn | None = None
    turned: bool = False


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


def packed(x: Float[Tensor, "B K S D"]) -> Float[Tensor, "B K S D"]:
    """The same, so that columns are one run of memory: `contiguous` says nothing of the stride of a width of 1."""
    x = x.contiguous()
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _groups(keys: slice | Tensor | Windows) -> int:
    if isinstance(keys, Windows):
        return keys.blocks
    return keys.shape[2] if isinstance(keys, Tensor) and keys.ndim == 4 else 0


def some_rows(x: Tensor, batch: slice | None) -> Tensor:
    return x if batch is None else x[batch]


class View:
    """How one part's operands look to products: [N, rows, D] and [N, keys, D].

    Heads that share a key head stand together; groups of rows with keys of their own are apart.
    """

    def __init__(self, part: Part, heads: slice, batch: slice | None, q: Tensor, k: Tensor):
        """For these query heads and batch rows; None: all."""
        self.part, self.keys, self.block, self.batch = part, part.keys, part.block, batch
        self.rows_heads, first, last = heads, *heads.indices(q.shape[1])[:2]
        self.heads, group = last - first, q.shape[1] // k.shape[1]
        self.key_heads = slice(first // group, -(-last // group))
        # 0: all heads and rows see the same keys
        self.groups = _groups(part.keys)
        self.apart = self.heads * self.groups or self.key_heads.stop - self.key_heads.start

    def fold(self, x: Tensor) -> Tensor:
        """[b, h, rows, d] of queries -> [N, n, d]; a view if x is contiguous."""
        return fold(x, self.apart)

    def sees(self, x: Tensor) -> bool:
        """Whether products may go there: `fold` of this is a view of it, and for `Windows` one run of memory, without
        which each window's product is a call of its own."""
        if isinstance(self.keys, Windows) and not x.is_contiguous():
            return False
        return self.fold(x).data_ptr() == x.data_ptr()

    def shape(self, query: Tensor) -> tuple[int, int, int]:
        """Of the rows that the bias is for: [b, h, rows], or with groups [b, h·g, rows / g]."""
        b, h, rows, _ = query.shape
        return (b, h * self.groups, rows // self.groups) if self.groups else (b, h, rows)

    def bias(self) -> Tensor | None:
        """[b|1, H|1, rows|1, n], or with groups [b|1, H·g, rows / g|1, n]."""
        bias = self.part.bias(self.batch or slice(None))
        if bias is None:
            return None
        if self.groups:
            return bias.expand(-1, self.heads, -1, -1, -1).flatten(1, 2)
        return bias[:, self.rows_heads] if bias.shape[1] > 1 else bias

    def take(self, k: Tensor, v: Tensor, shared: Shared, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """The part's columns of k and v."""
        keys = self.keys
        if isinstance(keys, slice):
            return self._mine(k, keys), self._mine(v, keys)
        if isinstance(keys, Windows):
            return self._windows(k, "k", scratch), self._windows(v, "v", scratch)
        if keys.ndim == 4:
            return self._gather(k, "k", scratch), self._gather(v, "v", scratch)
        if keys.ndim == 2:
            k, v = shared.take(keys)
            return self._mine(k), self._mine(v)
        return self._mine(k).index_select(1, keys), self._mine(v).index_select(1, keys)

    def gradients(self, dk: Tensor, dv: Tensor, shared: Shared, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Where the gradients of what was taken go: the real place, or one of their own from which `add` adds them."""
        keys = self.keys
        if isinstance(keys, slice):
            return self._mine(dk, keys), self._mine(dv, keys)
        if isinstance(keys, Windows):
            shape = (keys.blocks, keys.width, dk.shape[3])
            return scratch("dk", shape, dk), scratch("dv", shape, dv)
        if keys.ndim == 2:
            dk, dv = shared.gradients(keys, dk)
            return self._mine(dk), self._mine(dv)
        b = len(dk) if self.batch is None else len(range(len(dk))[self.batch])
        shape = (b * self.apart, keys.shape[-1] * self.block, dk.shape[3])
        return scratch("dk", shape, dk), scratch("dv", shape, dv)

    @property
    def fresh(self) -> bool:
        """Whether the gradients have a place of their own."""
        return isinstance(self.keys, Windows) or (isinstance(self.keys, Tensor) and self.keys.ndim != 2)

    def add(self, dk: Tensor, dv: Tensor, dkeys: Tensor, dvalues: Tensor) -> None:
        if not self.fresh:
            return
        for into, grad in ((dk, dkeys), (dv, dvalues)):
            if isinstance(self.keys, Windows):
                self.keys.add(self._one(into), grad)
                continue
            assert isinstance(self.keys, Tensor)
            if self.keys.ndim == 1:
                self._mine(into).index_add_(1, self.keys, grad)
            else:
                blocks = self._blocks(into)
                blocks.index_add_(0, self._index(), grad.view(-1, blocks.shape[1]))

    def _mine(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """Columns of the batch rows and key heads that the step is about, [N, columns, D]; a view.

        There is one batch row, or the heads and rows of the batch merge in memory (`_steps`).
        """
        x = some_rows(x, self.batch)[:, self.key_heads, columns]
        return x[0] if len(x) == 1 else x.view(-1, *x.shape[2:])

    def _windows(self, x: Tensor, name: str, scratch: Scratch) -> Tensor:
        assert isinstance(self.keys, Windows)
        return self.keys.near(self._one(x), lambda shape: scratch(name, shape, x))

    def _one(self, x: Tensor) -> Tensor:
        """[columns, D] of the one batch row and key head that the step is about."""
        return some_rows(x, self.batch)[0, self.key_heads.start]

    def _gather(self, x: Tensor, name: str, scratch: Scratch) -> Tensor:
        assert isinstance(self.keys, Tensor)
        blocks, index = self._blocks(x), self._index()
        taken = scratch(name, (len(index), blocks.shape[1]), x)
        torch.index_select(blocks, 0, index, out=taken)
        return taken.view(-1, self.keys.shape[-1] * self.block, x.shape[3])

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, K, S, D] -> [B·K·S / block, block·D], a view."""
        return x.view(-1, self.block * x.shape[3])

    def _index(self) -> Tensor:
        """Rows of `_blocks(x)` that the part takes, flat [b·H·g·m]."""
        assert isinstance(self.keys, Tensor)
        return some_rows(self.keys, self.batch).flatten()


class Shared:
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
