"""What one call of FlexAttention takes and gives: operands put behind each other, and their rows taken back.

    queries   L of the call | n global ones, which see everything
    keys      S of the call | G global ones, which all see | L of a second projection, which global queries see alone

Each part is filled up to whole blocks. So global tokens take no further attention, merge nothing, and a sink's share is
taken of all rows alike. One copy of each operand, which filling up would take anyway.

Where queries are turned for first tokens (first.py), these stand among the keys that all see, and a row is as wide as
both products: what the query asks all others, and what it asks the first.

    query   own | turned          key   k | 0, of a first token 0 | k
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.constants import constant
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast


class Joined(NamedTuple):
    """Which rows stand behind others; fillers are of row 0, and nothing is taken of them. Indices are expanded to all
    heads and channels, which takes no memory.

    Fields:
        rows: queries with fillers, without those of global tokens.
        asking: of q, or of the second projection's, that ask for everything; None: none.
        columns: keys with fillers, without those of global tokens.
        marked: of k and v, that all see; None: none.
        second: keys of a second projection with fillers; 0: there are none.
        back: which row of the result each query takes; None: its own.
        first: which of `marked` are asked by queries that are turned.
    """

    rows: int
    asking: Int[Tensor, "B H n D"] | None
    columns: int
    marked: Int[Tensor, "B K G D"] | None
    second: int
    back: Int[Tensor, "B H L D"] | None
    first: Bool[Tensor, "B 1 G 1"] | None = None


def filled(x: Tensor, rows: int, channels: int = 0) -> Tensor:
    """With rows of zeros behind it, and with channels of zeros up to so many."""
    more = rows - x.shape[2], max(0, channels - x.shape[3])
    return F.pad(x, (0, more[1], 0, more[0])) if any(more) else x


def cut(x: Tensor, rows: int, channels: int) -> Tensor:
    """What was before it was `filled`: one operator in backward, where two slices take two."""
    if x.shape[3] == channels:
        return x[:, :, :rows]
    found: Tensor = _Cut.apply(x, rows, channels)
    return found


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, channels: int) -> Tensor:
        ctx.shape = x.shape
        return x[:, :, :rows, :channels]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return filled(grad, *ctx.shape[2:]), None, None


def joined(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    plan: Joined,
    second: tuple[Tensor, Tensor, Tensor] | None = None,
    turned: Float[Tensor, "B H L D"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of one call."""
    if plan.asking is None and plan.marked is None:
        return filled(q, plan.rows), filled(k, plan.columns), filled(v, plan.columns)
    found: tuple[Tensor, Tensor, Tensor] = _Joined.apply(q, k, v, *(second or (None, None, None)), turned, plan)
    return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        q2, k2, v2, turned, plan = others
        ctx.sizes = q.shape[2], k.shape[2]
        ctx.plan, ctx.apart, ctx.turned = plan, q2 is not None, turned is not None
        wide = q if turned is None else torch.cat([q, turned], 3)
        queries = _up_to(wide, plan.rows)
        if plan.asking is not None:
            rows = (q if q2 is None else q2).gather(2, plan.asking)
            queries.append(rows if turned is None else torch.cat([rows, rows], 3))
        found = []
        for x, x2, double in ((k, k2, turned is not None), (v, v2, False)):
            parts = _up_to(_beside(x) if double else x, plan.columns)
            if plan.marked is not None:
                rows = x.gather(2, plan.marked)
                both = [rows.masked_fill(plan.first, 0), rows.where(plan.first, 0)] if double else []
                parts.append(torch.cat(both, 3) if double else rows)
            if x2 is not None:
                parts += _up_to(_beside(x2) if double else x2, plan.second)
            found.append(torch.cat(parts, 2))
        return torch.cat(queries, 2) if len(queries) > 1 else wide, found[0], found[1]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        plan, (L, S) = ctx.plan, ctx.sizes
        own, _, rows = dq.split([L, plan.rows - L, dq.shape[2] - plan.rows], 2)
        dq2 = dturned = None
        if ctx.turned:
            own, dturned = own.chunk(2, 3)
            if plan.asking is not None:
                rows = torch.add(*rows.chunk(2, 3))
        if plan.asking is not None and ctx.apart:
            dq2 = torch.zeros_like(own).scatter_add_(2, plan.asking, rows)
        elif plan.asking is not None:
            own = own.scatter_add(2, plan.asking, rows)
        count, found, others = 0 if plan.marked is None else plan.marked.shape[2], [], []
        for grad, double in ((dk, ctx.turned), (dv, False)):
            n = L if ctx.apart else 0
            mine, _, rows, of_second, _ = grad.split([S, plan.columns - S, count, n, plan.second - n], 2)
            if double:
                mine, of_second = (x[..., : x.shape[3] // 2] for x in (mine, of_second))
                plain, of_first = rows.chunk(2, 3)
                rows = torch.where(plan.first, of_first, plain)
            found.append(mine if plan.marked is None else mine.scatter_add(2, plan.marked, rows))
            others.append(of_second if ctx.apart else None)
        return own, *found, dq2, *others, dturned, None


def _beside(x: Tensor) -> Tensor:
    """With as many channels of zeros behind its own."""
    return F.pad(x, (0, x.shape[3]))


def _up_to(x: Tensor, rows: int) -> list[Tensor]:
    """x, and zeros behind it, of no memory."""
    missing = rows - x.shape[2]
    if not missing:
        return [x]
    return [x, constant((0.0,), like=x, dtype=x.dtype, axes=4).expand(*x.shape[:2], missing, x.shape[3])]


def taken(
    out: Float[Tensor, "B H R D"],
    lse: Float[Tensor, "B H R"],
    sink: Float[Tensor, " H"] | None,
    plan: Joined,
    length: int,
) -> Float[Tensor, "B H L D"]:
    """The rows of the call's queries, less what a sink takes: one more key, whose value is zero."""
    if plan.back is None and sink is None:
        return out[:, :, :length]
    found: Tensor = _Taken.apply(out, lse, sink, plan.back, length)
    return found


class _Taken(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, out: Tensor, lse: Tensor, sink: Tensor | None, back: Tensor | None, length: int) -> Tensor:
        ctx.shape, whole = out.shape, out
        shares: tuple[Tensor, Tensor] | None = None
        if sink is not None:
            # of a row that sees nothing 0, as its output is
            gap = lse - sink.to(lse.dtype)[:, None]
            shares = gap.sigmoid()[..., None], gap.neg_().sigmoid_()
            whole = (out * shares[0]).to(out.dtype)
            ctx.sink = sink.dtype
        ctx.save_for_backward(None if sink is None else out, *(shares or (None, None)), back)
        return whole[:, :, :length].clone() if back is None else whole.gather(2, back)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        out, shares, of_sink, back = saved
        # each row is taken once
        dout = filled(grad, ctx.shape[2]) if back is None else grad.new_zeros(ctx.shape).scatter_(2, back, grad)
        if shares is None:
            return dout, None, None, None, None
        dout = dout * shares
        dlse = (dout * out).sum(-1).mul_(of_sink)
        return dout.to(out.dtype), dlse, dlse.sum((0, 2)).neg_().to(ctx.sink), None, None
