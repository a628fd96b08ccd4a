"""Rows of global queries by projections of their own that meet hidden states, not keys: few rows, any number of tokens.

    q · (W_k x + b_k) = (W_kᵀ q) · x + q · b_k        Σ w (W_v x + b_v) = W_v (Σ w x) + b_v Σ w

So the projections meet the few global rows instead of all tokens. A pair costs E numbers a head instead of D. It is
one function with a backward by hand, since so little is computed that operators, passes over all hidden states and
fresh memory are what it costs: one gradient of hidden states is made, by one product.

Letters: r = H · n, the rows of all heads; m = B · (H / K) · n, those that share a key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import everyone_bias, global_columns, global_order, hides_nothing
from attention_zoo.ops.relative.projections import is_plain
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages

Turn = Callable[[Tensor, Tensor], Tensor]


def is_worth_it(call: PatternCall, *projections: nn.Module) -> bool:
    """Whether the global queries are so few that it costs less than half of projecting all tokens, and can be done.

    Not on CUDA, where the many small products cost the host more than two large ones cost the device.
    """
    if facts.on_cuda(call) is None:
        return False
    rows, (_, K, _, D) = global_order(call.queries)[0].shape[1], call.k.shape
    return 2 * rows * call.q.shape[1] <= K * D and all(map(is_plain, projections))


def with_absorbed_rows(
    call: PatternCall,
    out: Float[Tensor, "B H L D"],
    x: Float[Tensor, "B L E"],
    projections: tuple[nn.Linear, nn.Linear, nn.Linear],
    *,
    scale: float,
    turn: Turn | None = None,
    keys: Float[Tensor, "B K L D"] | None = None,
    to_out: nn.Module,
) -> Float[Tensor, "B H L D"]:
    """The output, with what global queries see of the call's last L keys (all of their document) in their rows.

    Args:
        out: of the pattern alone; written to.
        x: hidden states of those keys, of which the queries are some.
        projections: plain ones (`is_plain`) of queries, keys and values.
        turn: (queries or keys, positions) -> the same, turned by them; None: they are not.
        keys: where they are turned.
        to_out: what alone the output goes to.
    """
    queries = global_order(call.queries)[1]
    columns, flat = _places(call.queries)
    valid = None if bool(queries.valid.all()) else global_columns(call.queries)[1].valid[:, None, :, None]
    turn_rows = None
    if turn is not None:
        position = global_columns(call.queries)[1].position
        turn_rows = lambda q: turn(q, position)  # noqa: E731
    facts = _Facts(columns, flat, valid, _seen(call, x.shape[1]), scale, call.k.shape[1], turn_rows, is_plain(to_out))
    given = [each for layer in projections for each in (layer.weight, layer.bias)]
    return _Rows.apply(out, x, keys, call.sink, *given, facts)


class _Facts(NamedTuple):
    """Of the global rows, beside their numbers.

    Fields:
        columns: where they are; rows that have fewer are filled up, and `valid` is False there (None: nowhere).
        flat: the same among the tokens of all rows.
        seen: what is added to their scores; None: nothing.
        heads: of keys, K.
        owns_gradient: whether nobody else has the output's gradient, which then needs no copy.
    """

    columns: Int[Tensor, "B n"]
    flat: Int[Tensor, " Bn"]
    valid: Bool[Tensor, "B 1 n 1"] | None
    seen: Float[Tensor, "B #H n L"] | None
    scale: float
    heads: int
    turn: Callable[[Tensor], Tensor] | None
    owns_gradient: bool

    def by_matrix(self, rows: Float[Tensor, "B H n d"]) -> Float[Tensor, "K m d"]:
        """All rows that meet the same matrix together: for few rows, or heads that share no key head, no copy."""
        B, _, n, d = rows.shape
        return rows.reshape(B, self.heads, -1, n, d).transpose(0, 1).reshape(self.heads, -1, d)

    def by_row(self, rows: Float[Tensor, "K m d"]) -> Float[Tensor, "B r d"]:
        """And back."""
        B, d = len(self.columns), rows.shape[-1]
        return rows.view(self.heads, B, -1, d).transpose(0, 1).reshape(B, -1, d)


def _places(queries: Layout) -> tuple[Int[Tensor, "B n"], Int[Tensor, " Bn"]]:
    """Columns of global tokens, and the same among the tokens of all rows."""

    def find() -> tuple[Tensor, Tensor]:
        order, device = global_order(queries)[0], queries.valid.device
        starts = np.arange(len(order))[:, None] * queries.valid.shape[1]
        return tensor_of(order, device), tensor_of((order + starts).ravel(), device)

    return queries.plan("places of global tokens", find)


def _seen(call: PatternCall, keys: int) -> Float[Tensor, "B #H n L"] | None:
    """What is added to the scores of the last so many keys. A filler sees everything: it must only be finite."""
    S = call.k.shape[2]
    held = call.keys.columns(slice(S - keys, S))
    if hides_nothing(call, held):
        return None
    queries = global_columns(call.queries)[1]
    bias = everyone_bias(call, queries, held)
    return bias if queries.dense else bias.where(queries.valid[:, None, :, None], 0)


class _Rows(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, out, x, keys, sink, wq, bq, wk, bk, wv, bv, facts: _Facts) -> Tensor:
        (B, H, _, D), (_, L, E), n = out.shape, x.shape, facts.columns.shape[1]
        exact = torch.promote_types(x.dtype, torch.float32)
        states, index = x.to(exact), facts.columns[:, None, :, None].expand(-1, H, -1, D)
        some = states.flatten(0, 1)[facts.flat]
        # the scale rides along with the product, as everywhere below
        plain = torch.addmm(
            some.new_empty(()) if bq is None else bq.to(exact), some, wq.to(exact).mT,
            beta=0 if bq is None else facts.scale, alpha=facts.scale,
        ).view(B, n, H, D).transpose(1, 2)  # fmt: skip
        q = plain if facts.turn is None else facts.turn(plain)
        by_matrix = facts.by_matrix(q)
        if keys is None:
            asks = facts.by_row(torch.bmm(by_matrix, _heads(wk, facts, exact)))
            weights = torch.bmm(asks, states.mT)
        else:
            asks = q
            weights = (q.reshape(B, facts.heads, -1, D) @ keys.to(exact).mT).view(B, -1, L)
        if facts.seen is not None:
            weights = (weights.view(B, H, n, L) + facts.seen).view(B, -1, L)
        if sink is not None:
            # the bias of keys adds the same to all scores of a query: only a sink sees it
            if keys is None and bk is not None:
                weights += facts.by_row(by_matrix @ _heads(bk, facts, exact)[..., None])
            last = sink.to(exact).view(-1, 1, 1).expand(B, H, n, 1).reshape(B, -1, 1)
            weights = torch.cat([weights, last], -1)
        weights = weights.softmax(-1)
        if sink is not None:
            weights = weights[..., :L]
        found = facts.by_matrix(torch.bmm(weights, states).view(B, H, n, E))
        total = None if sink is None else weights.sum(-1, keepdim=True)
        matrices = _heads(wv, facts, exact).mT
        if bv is None:
            rows = torch.bmm(found, matrices)
        elif total is None:
            rows = torch.baddbmm(_heads(bv, facts, exact)[:, None], found, matrices)
        else:
            more = _heads(bv, facts, exact)[:, None] * facts.by_matrix(total.view(B, H, n, 1))
            rows = more.baddbmm_(found, matrices)
        rows = facts.by_row(rows).view(B, H, n, D).to(out.dtype)
        if facts.valid is not None:
            rows = rows.where(facts.valid, out.gather(2, index))
        ctx.save_for_backward(x, plain, q, asks, weights, found, some, wq, bq, wk, bk, wv, bv, keys, total)
        ctx.facts, ctx.sink, ctx.index = facts, None if sink is None else sink.dtype, index
        # in place, whoever saved it: attention reads its output again times that output's gradient, zero in these rows
        out.data.scatter_(2, index, rows)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, plain, q, asks, weights, found, some, wq, bq, wk, bk, wv, bv, keys, total = saved
        facts, exact, index, (B, H, n, D) = ctx.facts, q.dtype, ctx.index, q.shape
        states, dkeys, dbk = x.to(exact), None, None
        drows, dout = grad.gather(2, index), grad if facts.owns_gradient else grad.clone()
        if facts.valid is None:
            dout.scatter_(2, index, 0.0)
        else:
            dout.scatter_(2, index, drows.masked_fill(facts.valid, 0))
            drows = drows.masked_fill(~facts.valid, 0)
        # one piece of memory for the gradients of all matrices: three of a megabyte are torn from the system each time
        sizes = [len(wq), len(wk) if keys is None else 0, len(wv)]
        dwq, dwk, dwv = q.new_empty(sum(sizes), wq.shape[1]).split(sizes)
        # values, and the sums of hidden states that they were
        drows = facts.by_matrix(drows.to(exact))
        _outer(drows, found, dwv)
        dfound = torch.bmm(drows, _heads(wv, facts, exact))
        of_bias = drows if total is None else drows * facts.by_matrix(total.view(B, H, n, 1))
        dbv = None if bv is None else of_bias.sum(1)
        dfound = facts.by_row(dfound)
        # weights; a sink's share is among what they sum up to, and its value is zero
        dweights, dsink = torch.bmm(dfound, states.mT), None
        if total is not None:
            if bv is not None:
                dweights += facts.by_row(drows @ _heads(bv, facts, exact)[..., None])
            mean = (dweights * weights).sum(-1, keepdim=True)
            dsink = ((total - 1) * mean).view(B, H, n).sum((0, 2)).to(ctx.sink)
        dscores = torch._softmax_backward_data(dweights, weights, -1, exact)
        if keys is None:
            both = torch.cat([weights, dscores], 1).mT, torch.cat([dfound, asks], 1)
            dasks = facts.by_matrix(torch.bmm(dscores, states).view(B, H, n, -1))
            by_matrix = facts.by_matrix(q)
            _outer(by_matrix, dasks, dwk)
            matrices = _heads(wk, facts, exact).mT
            if bk is None or total is None:
                dbk = None if bk is None else torch.zeros_like(bk)
                dq = torch.baddbmm(dasks.new_empty(()), dasks, matrices, beta=0, alpha=facts.scale)
            else:
                dsum = facts.by_matrix(dscores.sum(-1, keepdim=True).view(B, H, n, 1))
                dbk = (dsum * by_matrix).sum(1)
                more = dsum * _heads(bk, facts, exact)[:, None]
                dq = more.baddbmm_(dasks, matrices, beta=facts.scale, alpha=facts.scale)
            dq = facts.by_row(dq)
        else:
            dwk = None  # they are the keys' own
            both, dscores = (weights.mT, dfound), dscores.view(B, facts.heads, -1, dscores.shape[2])
            dq, dkeys = (dscores @ keys.to(exact)).mul_(facts.scale), dscores.mT @ q.reshape(B, facts.heads, -1, D)
        dx = torch.bmm(*both, out=large_pages(torch.empty_like(states)))
        # queries
        dq = _turned_back(facts, plain, dq.view(q.shape)).transpose(1, 2).reshape(B * n, H * D)
        _outer(dq[None], some[None], dwq)
        dbq = None if bq is None else dq.sum(0)
        dx.flatten(0, 1).index_add_(0, facts.flat, dq @ wq.to(exact))
        gradients = (dx, dkeys, dwq, dbq, dwk, dbk, dwv, dbv)
        likes = (x, keys, wq, bq, wk, bk, wv, bv)
        given = [None if each is None else _like(each, like) for each, like in zip(gradients, likes)]
        return dout, *given[:2], dsink, *given[2:], None


def _heads(parameter: Tensor, facts: _Facts, dtype: torch.dtype) -> Float[Tensor, "K D *E"]:
    """A matrix, or a bias, of each key head."""
    return parameter.to(dtype).reshape(facts.heads, -1, *parameter.shape[1:])


def _outer(left: Float[Tensor, "K m D"], right: Float[Tensor, "K m E"], into: Float[Tensor, "KD E"]) -> None:
    """leftᵀ · right. Of one row torch's product takes longer than writing what it makes."""
    product = torch.mul if left.shape[1] == 1 else torch.bmm
    product(left.mT, right, out=into.view(len(left), -1, into.shape[1]))


def _like(gradient: Tensor, of: Tensor) -> Tensor:
    gradient = gradient if gradient.shape == of.shape else gradient.view(of.shape)
    return gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)


def _turned_back(facts: _Facts, plain: Tensor, dturned: Tensor) -> Tensor:
    """The gradient of queries before they are turned."""
    if facts.turn is None:
        return dturned
    with torch.enable_grad():
        leaf = plain.detach().requires_grad_()
        return torch.autograd.grad(facts.turn(leaf), leaf, dturned)[0]
