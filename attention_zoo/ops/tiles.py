"""The executor: run a list of tiles, each some query rows against some keys, and recompute in backward.

A tile's parts see disjoint keys and are merged exactly (ops/partial.py); what is saved for backward is q, k, v, the
output and one log-sum-exp per row, so memory is O(L·D) whatever the pattern. Gradients of keys and values accumulate in
place: plain autograd through `k[:, :, a:b]` would allocate a full-size zero tensor per tile, which is quadratic
(pytorch#9701).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.function import exact, once
from attention_zoo.ops.partial import merge, partial, partial_backward, weights_and_gradient

Bias = Callable[[], Tensor | None]


class Part(NamedTuple):
    """Keys that one tile sees, with their bias.

    Fields:
        keys: which columns of k and v. A slice is a view without a copy; int [n] is the same for all batch rows;
            int [B, n] is each row's own; int [B|1, H, g, m] is each head's own for each of g equal groups of the tile's
            rows, counted in blocks of `block` columns: n = m · block. k and v must then be contiguous and made of whole
            blocks; gathering long contiguous runs is what makes this fast (20 times, measured on CPU).
        bias: called when needed, forward and again backward; -inf unseen, or None. [B|1, H|1, rows|1, n]; with groups
            [B|1, H|1, g, rows / g|1, n].
        block: columns per entry of per-head `keys`.
    """

    keys: slice | Tensor
    bias: Bias
    block: int = 1


class Tile(NamedTuple):
    """Query rows and the parts that they see. Every row belongs to at most one tile; rows in none yield zeros."""

    rows: slice
    parts: Sequence[Part]


def run_tiles(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    tiles: Sequence[Tile],
    *,
    scale: float,
    learned: Sequence[Tensor] = (),
) -> Float[Tensor, "B H L D"]:
    """Attention along the tiles. `learned` are tensors that the biases depend on and that want a gradient."""
    return _Tiles.apply(q, k, v, tiles, scale, *learned)


class _Tiles(torch.autograd.Function):
    @staticmethod
    @exact
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], scale: float, *learned: Tensor):
        B, H, L, D = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        # laid out as the next projection wants it: merging the heads is then free
        out = q.new_zeros(B, L, H, D).transpose(1, 2)
        lse = q.new_full((B, H, L), -torch.inf, dtype=exact)
        for rows, parts in tiles:
            total: tuple[Tensor, Tensor] | None = None
            for part in parts:
                view = _View(part, H)
                found = partial(
                    view.rows(q[:, :, rows]), view.take(k), view.take(v), view.flat(part.bias()), scale=scale
                )
                found = view.unrows(found[0]), view.unrows(found[1][..., None])[..., 0]
                total = found if total is None else merge(*total, *found)
            if total is not None:
                out[:, :, rows], lse[:, :, rows] = total
        ctx.save_for_backward(q, k, v, out, lse, *learned)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    @once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor):
        q, k, v, out, lse, *learned = saved
        exact = torch.promote_types(q.dtype, torch.float32)
        H = q.shape[1]
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        dlearned = [torch.zeros_like(x) for x in learned]
        for rows, parts in ctx.tiles:
            for part in parts:
                view = _View(part, H)
                mine = [view.rows(x[:, :, rows]) for x in (grad, q, out)]
                my_lse = view.rows(lse[:, :, rows][..., None])[..., 0]
                keys, values = view.take(k), view.take(v)
                bias = view.flat(part.bias())
                gq, gk, gv = partial_backward(mine[0], mine[1], keys, values, mine[2], my_lse, bias, scale=ctx.scale)
                dq[:, :, rows] += view.unrows(gq).to(q.dtype)
                view.add(dk, gk)
                view.add(dv, gv)
                if learned:
                    _learn(dlearned, learned, part, view, (mine[0], mine[1], keys, values, mine[2], my_lse), ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, *dlearned


def _learn(total: list[Tensor], learned: list[Tensor], part: Part, view: _View, operands: tuple, scale: float) -> None:
    """Add the gradient that this part's bias hands to what it was computed from."""
    with torch.enable_grad():
        bias = view.flat(part.bias())
    if bias is None or not bias.requires_grad:
        return
    exact = torch.promote_types(operands[1].dtype, torch.float32)
    grad, q, k, v, out, lse = (x.to(exact) for x in operands)
    _, dscores = weights_and_gradient(grad, q, k, v, out, lse, bias.detach().to(exact), scale=scale)
    dbias = dscores.sum_to_size(bias.shape).to(bias.dtype)
    for into, share in zip(total, torch.autograd.grad(bias, learned, dbias, allow_unused=True)):
        if share is not None:
            into += share


class _View:
    """How one part's operands look to `partial`: groups of rows with keys of their own become extra heads."""

    def __init__(self, part: Part, heads: int):
        self.keys, self.heads, self.block = part.keys, heads, part.block
        # 0: all heads and rows see the same keys
        self.groups = part.keys.shape[2] if isinstance(part.keys, Tensor) and part.keys.ndim == 4 else 0

    def rows(self, x: Tensor) -> Tensor:
        """[B, H, rows, D] -> [B, H·g, rows / g, D]."""
        return x.unflatten(2, (self.groups, -1)).flatten(1, 2) if self.groups else x

    def unrows(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, self.groups)).flatten(2, 3) if self.groups else x

    def flat(self, bias: Tensor | None) -> Tensor | None:
        """[B|1, H|1, g, rows / g, n] -> [B|1, H·g, rows / g, n]."""
        if bias is None or not self.groups:
            return bias
        return bias.expand(-1, self.heads, -1, -1, -1).flatten(1, 2)

    def take(self, x: Tensor) -> Tensor:
        """The part's columns of k or v, [B, K, S, D] -> [B, K, n, D] or [B, H·g, n, D]."""
        if isinstance(self.keys, slice):
            return x[:, :, self.keys]
        if self.keys.ndim == 1:
            return x.index_select(2, self.keys)
        if self.keys.ndim == 2:
            index = self.keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, index)
        taken = self._blocks(x).index_select(0, self._index(x))
        return taken.view(x.shape[0], self.heads * self.groups, -1, x.shape[3])

    def add(self, into: Tensor, grad: Tensor) -> None:
        """Add gradients of the taken columns in place."""
        if isinstance(self.keys, slice):
            into[:, :, self.keys] += grad
        elif self.keys.ndim == 1:
            into.index_add_(2, self.keys, grad)
        elif self.keys.ndim == 2:
            into.scatter_add_(2, self.keys[:, None, :, None].expand_as(grad), grad)
        else:
            blocks = self._blocks(into)
            blocks.index_add_(0, self._index(into), grad.reshape(-1, blocks.shape[1]))

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, K, S, D] -> [B·K·S / block, block·D], a view."""
        return x.view(-1, self.block * x.shape[3])

    def _index(self, x: Tensor) -> Tensor:
        """Rows of `_blocks(x)` that the part takes, flat [B·H·g·m]; consecutive heads share a key head."""
        B, K, S, _ = x.shape
        assert isinstance(self.keys, Tensor)
        assert S % self.block == 0
        batch = torch.arange(B, device=x.device)[:, None] * K
        head = torch.arange(self.heads, device=x.device) // (self.heads // K)
        return ((batch + head)[:, :, None, None] * (S // self.block) + self.keys).flatten()
