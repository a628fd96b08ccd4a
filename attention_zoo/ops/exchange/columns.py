"""Fetch columns from their owners, differentiably: gradients go back to the owners, who sum them in a fixed order.

In two steps, so that messages travel while something else is computed:

    pending = start(x, route, "keys")        # sent
    ...                                       # what needs none of it
    halo = pending.wait()                     # [B, n, E]

Backward does the same the other way: gradients are sent as soon as they are known, and waited for where x was made,
after what else was made since has its gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.exchange.messages import Messages, next_number
from attention_zoo.ops.exchange.route import Route
from attention_zoo.ops.softmax.function import differentiable_once


def fetched(x: Float[Tensor, "B L E"], route: Route, kind: str) -> Float[Tensor, "B n E"]:
    """What comes along the route, sender after sender.

    Args:
        x: this process's entries.
        kind: under which the bytes are counted.
    """
    return start(x, route, kind).wait()


def start(x: Float[Tensor, "B L E"], route: Route, kind: str) -> Pending:
    """Send what others need, and return without waiting for what comes. Every process of the group must call it."""
    pending = Pending(x, route, kind)
    pending.mark = _Start.apply(x, pending)
    return pending


class Pending:
    """Columns under way. `wait` gives them, once."""

    def __init__(self, x: Tensor, route: Route, kind: str):
        self.route, self.kind, self.shape, self.number = route, kind, x.shape, next_number(route.placement)
        self.mark: Tensor | None = None  # ties what comes to where x was made
        self.under_way: Messages | None = None
        self.came: list[Tensor] = []

    def wait(self) -> Float[Tensor, "B n E"]:
        """What came, sender after sender."""
        mark, self.mark = self.mark, None  # its graph holds this object: nobody else would free the two
        assert mark is not None, "an exchange is waited for once"
        return _Finish.apply(mark, self)

    def post(self, sent: list[Tensor], like: Tensor, counts: list[int], direction: str) -> None:
        """Messages one way; those of the other way are gone by then."""
        kind = int(direction == "backward")
        B, _, E = self.shape
        self.came = [like.new_empty(B, count, E) for count in counts]
        names = self.kind, direction
        self.under_way = Messages(self.route.placement, self.number, kind, sent, self.came, names)

    def arrived(self) -> list[Tensor]:
        """What came, by sender."""
        assert self.under_way is not None, "nothing was sent"
        self.under_way.wait()
        came, self.came = self.came, []
        return came


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Pending) -> Tensor:
        ctx.pending, ctx.like = pending, x.new_empty(0)
        route = pending.route
        pending.post([x.index_select(1, some) for some in route.sends], x, list(route.receives), "forward")
        return x.new_empty(0)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], mark: Tensor) -> tuple[Tensor, None]:
        pending = ctx.pending
        total = ctx.like.new_zeros(pending.shape)
        # sender after sender, and none sends an entry twice: always the same sums
        for some, share in zip(pending.route.sends, pending.arrived(), strict=True):
            if len(some):
                total.index_add_(1, some, share)
        return total, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mark: Tensor, pending: Pending) -> Tensor:
        ctx.pending, ctx.like = pending, mark.new_empty(0)
        return torch.cat(pending.arrived(), 1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        pending = ctx.pending
        shares = [share.contiguous() for share in grad.split(list(pending.route.receives), 1)]
        pending.post(shares, ctx.like, [len(some) for some in pending.route.sends], "backward")
        return ctx.like.new_zeros(0), None
