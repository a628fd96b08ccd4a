"""Tokens of each row moved together, padding behind them: for kernels to which columns must be positions.

A permutation of the columns, so that its gradient is the one back: one gather each way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.visible import runs_of


class SideBySide(NamedTuple):
    """What stands where.

    Fields:
        tokens: of the new columns.
        order: which column each new one was.
        back: which new column each column is.
    """

    tokens: Layout
    order: Int[Tensor, "B L"]
    back: Int[Tensor, "B L"]

    def moved(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        """In the new columns."""
        found: Tensor = _Reordered.apply(x, self.order, self.back)
        return found

    def returned(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        """In the columns that were."""
        found: Tensor = _Reordered.apply(x, self.back, self.order)
        return found


def side_by_side(layout: Layout) -> SideBySide | None:
    """The tokens of a layout moved together; None: even then some would not stand at consecutive positions."""
    return layout.plan("side by side", lambda: _side_by_side(layout))


def _side_by_side(layout: Layout) -> SideBySide | None:
    order = np.argsort(~layout.host.valid, axis=1, kind="stable")
    device = layout.valid.device
    tokens = Layout.known(layout.host.take(order), device)
    if not runs_of(tokens).consecutive:
        return None
    return SideBySide(tokens, tensor_of(order, device), tensor_of(np.argsort(order, axis=1), device))


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.gather(1, order[..., None].expand_as(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Reordered.apply(grad, back, order), None, None
