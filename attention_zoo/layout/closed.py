"""Rows closed up: the valid tokens of each moved together to its front, what came of them back to where they stood.

Positions count valid tokens, so that a mechanism gives a token the same wherever padding lies. With all of it at the
end columns are positions, which the fastest kernels ask for; and rows that are all shorter than the call, as where
batches are padded to a fixed length, are computed at their own lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout

WORTH = 7 / 8
"""Share of the columns, at most, that the longest row has where this alone is gained: moving copies tokens twice."""


class Closed:
    """Where the tokens of a layout go, and how they come back.

    Attributes:
        layout: what the new columns are, padding at their end.
    """

    def __init__(self, given: Layout):
        host, device = given.host, given.valid.device
        (B, L), counts = host.valid.shape, host.valid.sum(1)
        columns = max(1, int(counts.max()))
        row, place = np.arange(B)[:, None], host.valid.cumsum(1) - 1
        source = np.argsort(~host.valid, 1, kind="stable")[:, :columns]  # valid ones first, in their order
        self.layout = Layout.known(host.take(source).only(np.arange(columns) < counts[:, None]), device)
        self._there = tensor_of(row * L + source, device)
        self._back = tensor_of(row * columns + place.clip(min=0), device)
        self._padding = tensor_of((~host.valid).reshape(-1).nonzero()[0], device)

    @staticmethod
    def of(layout: Layout, *, front: bool) -> Closed | None:
        """How to close it up; None where that does not pay, or somebody's positions have gaps."""
        if layout.dense or layout.placement is not None or not _pays(layout, front):
            return None
        made = layout.plan("closed", lambda: Closed(layout))
        return made if made.layout.aligned else None

    def close(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, "B n E"]:
        """The tokens side by side, and what stands at padding behind them, whose gradient is anything."""
        found: Tensor = _Closed.apply(x, self._there, self._back)
        return found

    def open(self, y: Float[Tensor, "B n E"], blank: Float[Tensor, " E"]) -> Float[Tensor, "B L E"]:
        """What came of them, where they stood; `blank` at padding."""
        found: Tensor = _Opened.apply(y, blank, self._there, self._back, self._padding, self.layout.padding)
        return found


def _taken(x: Float[Tensor, "BL E"], there: Int[Tensor, "B n"]) -> Float[Tensor, "B n E"]:
    return nn.functional.embedding(there, x)


class _Closed(torch.autograd.Function):
    """Each token goes to one place: its gradient is a copy from there, where gathering would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return _taken(x.flatten(0, 1), there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _taken(grad.flatten(0, 1), ctx.back), None, None


class _Opened(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, blank: Tensor, there: Tensor, back: Tensor, padding: Tensor, behind: Tensor | None
    ) -> Tensor:
        ctx.way = there, padding, behind, blank.dtype
        out = _taken(y.flatten(0, 1), back)
        out.view(-1, out.shape[-1])[padding] = blank.to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        there, padding, behind, dtype = ctx.way
        rows = grad.flatten(0, 1)
        dy, dblank = _taken(rows, there), rows.index_select(0, padding).sum(0)
        return dy if behind is None else dy.masked_fill_(behind, 0), dblank.to(dtype), None, None, None, None


def _pays(layout: Layout, front: bool) -> bool:
    """Whether there are holes, or padding in front that costs, or all rows are much shorter than the call."""
    valid = layout.host.valid
    if front and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        return True
    return not layout.aligned or int(valid.sum(1).max()) <= WORTH * valid.shape[1]
