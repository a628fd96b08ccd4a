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

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import everyone_seen, global_columns
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
    rows, (_, K, _, D) = global_columns(call.queries)[0].shape[1], call.k.shape
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
) -> Float[Tensor, "B H L D"]:
    """The output, with what global queries see of the call's last L keys (all of their document) in their rows.

    Args:
        out: of the pattern alone.
        x: hidden states of those keys, of which the queries are some.
        projections: plain ones (`is_plain`) of queries, keys and values.
        turn: (queries or keys, positions) -> the same, turned by them; None: they are not.
        keys: where they are turned.
    """
    columns, queries = global_columns(call.queries)
    position, valid = queries.position, None if queries.dense else queries.valid[:, None, :, None]
    turn_rows = None if turn is None else lambda q: turn(q, position)
    facts = _Facts(columns, valid, _seen(call, x.shape[1]), scale, call.k.shape[1], turn_rows)
    given = [each for layer in projections for each in (layer.weight, layer.bias)]
    return _Rows.apply(out, x, keys, call.sink, *given, facts)


class _Facts(NamedTuple):
    """Of the global rows, beside their numbers.

    Fields:
        columns: where they are; rows that have fewer are filled up, and `valid` is False there (None: nowhere).
        seen: what is added to their scores; None: nothing.
        heads: of keys, K.
    """

    columns: Int[Tensor, "B n"]
    valid: Bool[Tensor, "B 1 n 1"] | None
    seen: Float[Tensor, "B #H n L"] | None
    scale: float
    heads: int
    turn: Callable[[Tensor], Tensor] | None

    def at(self, x: Float[Tensor, "B H L D"]) -> Int[Tensor, "B H n D"]:
        return self.columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])

    def by_matrix(self, rows: Tensor) -> Float[Tensor, "K m d"]:
        """[B, H, n, d] or [B, r, d]: all rows that meet the same matrix together."""
        B, d = len(rows), rows.shape[-1]
        if B > 1:
            rows = rows.reshape(B, self.heads, -1, d).transpose(0, 1)
        return rows.reshape(self.heads, -1, d)

    def by_row(self, rows: Float[Tensor, "K m d"]) -> Float[Tensor, "B r d"]:
        """And back."""
        B, d = len(self.columns), rows.shape[-1]
        if B > 1:
            rows = rows.reshape(self.heads, B, -1, d).transpose(0, 1)
        return rows.reshape(B, -1, d)


def _seen(call: PatternCall, keys: int) -> Float[Tensor, "B #H n L"] | None:
    """What is added to the scores of the last so many keys. A filler sees everything: it must only be finite."""
    queries, S = global_columns(call.queries)[1], call.k.shape[2]
    bias = everyone_seen(call, queries, call.keys.columns(slice(S - keys, S)))
    return bias if bias is None or queries.dense else bias.where(queries.valid[:, None, :, None], 0)


class _Rows(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, out, x, keys, sink, wq, bq, wk, bk, wv, bv, facts: _Facts) -> Tensor:
        (B, H, _, D), n = out.shape, facts.columns.shape[1]
        exact = torch.promote_types(x.dtype, torch.float32)
        states, shape = x.to(exact), (B, H, n, x.shape[1])
        some = states.gather(1, facts.columns[..., None].expand(-1, -1, x.shape[2]))
        plain = nn.functional.linear(some, wq.to(exact), None if bq is None else bq.to(exact))
        plain = plain.view(B, n, H, D).transpose(1, 2)
        q = (plain if facts.turn is None else facts.turn(plain)) * facts.scale
        if keys is None:
            asks = facts.by_row(facts.by_matrix(q) @ _heads(wk, facts, exact))
            weights = (asks @ states.transpose(1, 2)).view(shape)
        else:
            asks = q
            weights = (q.reshape(B, facts.heads, -1, D) @ keys.to(exact).transpose(2, 3)).view(shape)
        if facts.seen is not None:
            weights = weights + facts.seen
        if sink is not None:
            # the bias of keys adds the same to all scores of a query: only a sink sees it
            if keys is None and bk is not None:
                weights += facts.by_row(facts.by_matrix(q) @ _heads(bk, facts, exact)[..., None]).view(B, H, n, 1)
            last = sink.to(exact).view(-1, 1, 1).expand(B, H, n, 1)
            weights = torch.cat([weights, last], -1)
        weights = weights.softmax(-1)[..., : shape[3]].reshape(B, H * n, -1)
        found = facts.by_matrix(weights @ states)
        rows = found @ _heads(wv, facts, exact).transpose(1, 2)
        total = None if sink is None else weights.sum(-1, keepdim=True)
        if bv is not None:
            more = _heads(bv, facts, exact)[:, None]
            rows += more if total is None else more * facts.by_matrix(total)
        rows, index = facts.by_row(rows).view(B, H, n, D).to(out.dtype), facts.at(out)
        if facts.valid is not None:
            rows = rows.where(facts.valid, out.gather(2, index))
        ctx.save_for_backward(x, plain, q, asks, weights, found, some, wq, bq, wk, bk, wv, bv, keys, total)
        ctx.facts, ctx.sink = facts, None if sink is None else sink.dtype
        return out.clone().scatter_(2, index, rows)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, plain, q, asks, weights, found, some, wq, bq, wk, bk, wv, bv, keys, total = saved
        facts, exact, (B, H, n, D) = ctx.facts, q.dtype, q.shape
        states, index, dkeys, dwk, dbk = x.to(exact), facts.at(grad), None, None, None
        drows = grad.gather(2, index)
        dout = grad.clone()
        if facts.valid is None:
            dout.scatter_(2, index, 0.0)
        else:
            dout.scatter_(2, index, drows.masked_fill(facts.valid, 0))
            drows = drows.masked_fill(~facts.valid, 0)
        # values, and the sums of hidden states that they were
        drows = facts.by_matrix(drows.to(exact))
        dwv, dfound = _outer(drows, found), drows @ _heads(wv, facts, exact)
        dbv = None if bv is None else (drows if total is None else drows * facts.by_matrix(total)).sum(1)
        mean, of_total = facts.by_row((dfound * found).sum(-1, keepdim=True)), None
        if total is not None and bv is not None:
            of_total = facts.by_row(drows @ _heads(bv, facts, exact)[..., None])
            mean = mean + of_total * total
        dfound = facts.by_row(dfound)
        dsink = None if total is None else ((total - 1) * mean).view(B, H, n).sum((0, 2)).to(ctx.sink)
        # weights
        dscores = dfound @ states.transpose(1, 2)
        dscores = dscores.sub_(mean if of_total is None else mean - of_total).mul_(weights)
        if keys is None:
            both = torch.cat([weights, dscores], 1).transpose(1, 2), torch.cat([dfound, asks], 1)
            dasks = facts.by_matrix(dscores @ states)
            dq, dwk = dasks @ _heads(wk, facts, exact).transpose(1, 2), _outer(facts.by_matrix(q), dasks)
            if bk is not None:
                dbk = torch.zeros_like(bk)
                if total is not None:
                    dsum = facts.by_matrix(dscores.sum(-1, keepdim=True))
                    dq += dsum * _heads(bk, facts, exact)[:, None]
                    dbk = (dsum * facts.by_matrix(q)).sum(1)
            dq = facts.by_row(dq)
        else:
            both, dscores = (weights.transpose(1, 2), dfound), dscores.view(B, facts.heads, -1, dscores.shape[2])
            dq, dkeys = dscores @ keys.to(exact), dscores.transpose(2, 3) @ q.reshape(B, facts.heads, -1, D)
        dx = torch.bmm(*both, out=large_pages(torch.empty_like(states)))
        # queries
        dq = _turned_back(facts, plain, dq.reshape(q.shape) * facts.scale).transpose(1, 2).reshape(B * n, H * D)
        dwq, dbq = _outer(dq, some.flatten(0, 1)), None if bq is None else dq.sum(0)
        dsome = (dq @ wq.to(exact)).view_as(some)
        dx.scatter_add_(1, facts.columns[..., None].expand_as(some), dsome)
        gradients = (dx, dkeys, dwq, dbq, dwk, dbk, dwv, dbv)
        likes = (x, keys, wq, bq, wk, bk, wv, bv)
        given = [
            None if each is None else each.reshape(like.shape).to(like.dtype) for each, like in zip(gradients, likes)
        ]
        return dout, *given[:2], dsink, *given[2:], None


def _heads(parameter: Tensor, facts: _Facts, dtype: torch.dtype) -> Float[Tensor, "K D *E"]:
    """A matrix, or a bias, of each key head."""
    return parameter.to(dtype).reshape(facts.heads, -1, *parameter.shape[1:])


def _outer(left: Float[Tensor, "*K m i"], right: Float[Tensor, "*K m j"]) -> Float[Tensor, "*K i j"]:
    """leftᵀ · right. Of one row torch's product takes longer than writing what it makes."""
    return left.mT * right if left.shape[-2] == 1 else left.mT @ right


def _turned_back(facts: _Facts, plain: Tensor, dturned: Tensor) -> Tensor:
    """The gradient of queries before they are turned."""
    if facts.turn is None:
        return dturned
    with torch.enable_grad():
        leaf = plain.detach().requires_grad_()
        return torch.autograd.grad(facts.turn(leaf), leaf, dturned)[0]
