"""Common keys: a few keys that every row sees besides those of its tile, all rows at once.

As a part of each tile they would cost it a dozen small operators. Here their scores are one product for all rows; the
sums of a tile begin with them, and so does its gradient of queries, so that hardly a pass over the rows is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.softmax.partial import LOG2E

ROWS = 256
"""At once, of one batch row: its heads and rows do not merge in memory, and what is read twice stays near."""


class Common(NamedTuple):
    """Few keys that all rows see.

    Fields:
        columns: which, of each batch row.
        bias: what is added to their scores; -inf unseen.
    """

    columns: Int[Tensor, "B n"]
    bias: Float[Tensor, "#B #H L n"]


class CommonKeys:
    """They, in one call, first forward or first backward.

    Attributes:
        exponents: [B, H, L, m], after `forward`: log2(e) · (scores + bias) of all rows; with a sink its own behind
            them, as of a key whose value is zero.
        dscores: [B, H, L, n], after `backward`: the gradient of scores.
    """

    exponents: Tensor
    dscores: Tensor

    def __init__(self, common: Common, q: Float[Tensor, "B H L D"], k: Tensor, v: Tensor, scale: float):
        self.columns, self.scale, self.dtype = common.columns, scale, torch.promote_types(q.dtype, torch.float32)
        self.group, self.shape = q.shape[1] // k.shape[1], (*q.shape[:2], common.columns.shape[1], q.shape[2])
        self.bias = (common.bias * LOG2E).transpose(2, 3).to(self.dtype).expand(self.shape)
        self.k, self.v = self._gather(k), self._gather(v)

    def forward(self, q: Tensor, sink: Float[Tensor, " H"] | None) -> None:
        B, H, n, L = self.shape
        exponents = self.k.new_empty(B, H, n + (sink is not None), L)
        if sink is not None:
            exponents[:, :, n] = sink.to(self.dtype).view(-1, 1) * LOG2E
            self.v = torch.nn.functional.pad(self.v, (0, 0, 0, 1))
        mine = exponents[:, :, :n].copy_(self.bias)
        keys = self.k * (self.scale * LOG2E)
        for row, rows, (asking,) in self._pieces(q):
            mine[row, ..., rows].baddbmm_(keys[row], asking.mT)
        self.exponents = exponents.transpose(2, 3).contiguous()

    def of(self, batch: slice | None, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Exponents [b, h, rows, m] and values [b, h, m, D] of a tile's rows."""
        if batch is None:
            return self.exponents[:, heads, rows], self.v[:, heads]
        return self.exponents[batch, heads, rows], self.v[batch, heads]

    def backward(
        self, q: Tensor, grad: Tensor, shift: Float[Tensor, "B H L 1"], delta: Float[Tensor, "B H L 1"],
        dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Add to the gradients of keys and values, and find that of the scores. See `Asked`."""
        weights = self.bias + shift.mT
        dscores = weights.new_empty(weights.shape).copy_(delta.mT)
        dkeys, dvalues = torch.zeros_like(self.k), torch.zeros_like(self.k)
        keys = self.k * (self.scale * LOG2E)
        for row, rows, (asking, back) in self._pieces(q, grad):
            mine, some = weights[row, ..., rows], dscores[row, ..., rows]
            mine.baddbmm_(keys[row], asking.mT).exp2_()
            some.baddbmm_(self.v[row], back.mT).mul_(mine)
            dkeys[row].baddbmm_(some, asking, alpha=self.scale)
            dvalues[row].baddbmm_(mine, back)
        self.k *= self.scale
        self.dscores = dscores.mT
        index = self.columns[:, None, :, None].expand(-1, dk.shape[1], -1, dk.shape[3])
        for into, found in ((dk, dkeys), (dv, dvalues)):
            into.scatter_add_(2, index, found if self.group == 1 else found.unflatten(1, (-1, self.group)).sum(2))

    def dqueries(self, batch: slice | None, heads: slice, rows: slice, into: Float[Tensor, "b h l D"]) -> None:
        """Overwrite the gradient of a tile's queries by these keys' share of it."""
        dscores, keys = self.dscores[:, heads, rows], self.k[:, heads]
        if batch is not None:
            dscores, keys = dscores[batch], keys[batch]
        # key by key: products of a few columns into rows that lie apart are slow
        torch.mul(dscores[..., :1], keys[:, :, :1], out=into)
        for key in range(1, self.shape[2]):
            into.addcmul_(dscores[..., key : key + 1], keys[:, :, key : key + 1])

    def _gather(self, x: Float[Tensor, "B K S D"]) -> Float[Tensor, "B H n D"]:
        index = self.columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        found = x.gather(2, index).to(self.dtype)
        return found if self.group == 1 else found.repeat_interleave(self.group, 1)

    def _pieces(self, *of_rows: Float[Tensor, "B H L D"]) -> Iterator[tuple[int, slice, list[Tensor]]]:
        B, _, L, _ = of_rows[0].shape
        for row in range(B):
            for start in range(0, L, ROWS):
                rows = slice(start, min(start + ROWS, L))
                yield row, rows, [x[row, :, rows].to(self.dtype) for x in of_rows]
