"""Rows of global queries by projections of their own that meet hidden states, not keys: few rows, any number of tokens.

    q · (W_k x + b_k) = (W_kᵀ q) · x + q · b_k        Σ w (W_v x + b_v) = W_v (Σ w x) + b_v Σ w

So the projections meet the few global rows instead of all tokens. A pair costs E numbers a head instead of D.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import everyone_seen, global_columns
from attention_zoo.ops.relative.projections import is_plain
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.pages import large_pages
from attention_zoo.ops.softmax.partial import fold


def is_worth_it(call: PatternCall, *projections: nn.Module) -> bool:
    """Whether the global queries are so few that it costs less than half of projecting all tokens, and can be done.

    Not on CUDA, where the many small products cost the host more than two large ones cost the device.
    """
    if facts.on_cuda(call) is None:
        return False
    rows, (_, K, _, D) = global_columns(call.queries)[0].shape[1], call.k.shape
    return 2 * rows * call.q.shape[1] <= K * D and all(map(is_plain, projections))


def absorbed_rows(
    call: PatternCall,
    q: Float[Tensor, "B H n D"],
    x: Float[Tensor, "B L E"],
    to_k: nn.Linear | Float[Tensor, "B K L D"],
    to_v: nn.Linear,
) -> Float[Tensor, "B H n D"]:
    """What global queries see of the call's last L keys: all of their document.

    Args:
        q: the global queries of the call, in the order of `global_columns`.
        x: hidden states of those keys.
        to_k, to_v: plain projections (`is_plain`); or keys, where they are turned by their positions.
    """
    B, H, n, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, asks = q.to(exact) * call.scale, None
        if isinstance(to_k, Tensor):
            scores = fold(queries, to_k.shape[1]) @ to_k.to(exact).flatten(0, 1).transpose(1, 2)
            scores = scores.view(B, H, n, -1)
        else:
            asks = _through(queries, _matrix(to_k, call))
            # the bias of keys adds the same to all scores of a query: only a sink sees it
            scores = queries.new_zeros(B, H, n, 1)
            if to_k.bias is not None:
                scores = (queries * _by_head(to_k.bias, call)).sum(-1, keepdim=True)
        found, total = _Meet.apply(scores, asks, x, _seen(call, x.shape[1]), call.sink)
        found = _back(found, _matrix(to_v, call))
        if to_v.bias is not None:
            found = found + _by_head(to_v.bias, call) * (1 if call.sink is None else total)
    return found.to(q.dtype)


def put_rows(call: PatternCall, out: Float[Tensor, "B H L D"], rows: Float[Tensor, "B H n D"]) -> Tensor:
    """The output with global rows, in the order of `global_columns`, in the place of what the pattern gave them."""
    columns, queries = global_columns(call.queries)
    return _Put.apply(out, rows, columns[:, None, :, None], queries.valid[:, None, :, None])


def _seen(call: PatternCall, keys: int) -> Float[Tensor, "B #H n L"] | None:
    """What is added to the scores of the last so many keys. A filler sees everything: it must only be finite."""
    queries, S = global_columns(call.queries)[1], call.k.shape[2]
    bias = everyone_seen(call, queries, call.keys.columns(slice(S - keys, S)))
    return None if bias is None else bias.where(queries.valid[:, None, :, None], 0)


def _through(rows: Float[Tensor, "B H n D"], matrix: Float[Tensor, "K D E"]) -> Float[Tensor, "B H n E"]:
    """Each head's rows times the matrix of its key head: one product, of all rows that share one."""
    (B, _, n, _), K = rows.shape, len(matrix)
    product = rearrange(rows, "b (k g) n d -> k (b g n) d", k=K) @ matrix
    return rearrange(product, "k (b g n) e -> b (k g) n e", b=B, n=n)


def _back(rows: Float[Tensor, "B H n E"], matrix: Float[Tensor, "K D E"]) -> Float[Tensor, "B H n D"]:
    """The same times the transposed, in the order that makes the matrix's gradient as it lies in memory."""
    (B, _, n, _), K = rows.shape, len(matrix)
    product = matrix @ rearrange(rows, "b (k g) n e -> k e (b g n)", k=K)
    return rearrange(product, "k d (b g n) -> b (k g) n d", b=B, n=n)


def _matrix(layer: nn.Linear, call: PatternCall) -> Float[Tensor, "K D E"]:
    exact = torch.promote_types(layer.weight.dtype, torch.float32)
    return layer.weight.to(exact).unflatten(0, (call.k.shape[1], -1))


def _by_head(bias: Tensor, call: PatternCall) -> Float[Tensor, "H 1 D"]:
    """Of each query head's key head."""
    found = bias.to(torch.promote_types(bias.dtype, torch.float32)).unflatten(0, (call.k.shape[1], 1, -1))
    return found.repeat_interleave(call.q.shape[1] // call.k.shape[1], 0)


class _Meet(torch.autograd.Function):
    """Sums of hidden states by softmax(asks · states + scores + bias), and of the weights without a sink's.

    By hand: plain autograd makes the gradient of all hidden states twice, and fresh memory is what costs here.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        scores: Float[Tensor, "B H n #L"],
        asks: Float[Tensor, "B H n E"] | None,
        x: Float[Tensor, "B L E"],
        bias: Float[Tensor, "B #H n L"] | None,
        sink: Float[Tensor, " H"] | None,
    ) -> tuple[Float[Tensor, "B H n E"], Float[Tensor, "B H n 1"]]:
        states, shape = x.to(scores.dtype), (*scores.shape[:3], x.shape[1])
        weights = scores.expand(shape)
        if asks is not None:
            weights = torch.baddbmm(weights.flatten(1, 2), asks.flatten(1, 2), states.transpose(1, 2)).view(shape)
        weights = weights if bias is None else weights + bias
        if sink is not None:
            last = sink.to(weights.dtype).view(-1, 1, 1).expand(*shape[:3], 1)
            weights = torch.cat([weights, last], -1)
        weights = weights.softmax(-1)[..., : shape[3]]
        found = (weights.flatten(1, 2) @ states).view(*shape[:3], -1)
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(x, weights, found, total, *(() if asks is None else (asks,)))
        ctx.one_score, ctx.sink = scores.shape[3] == 1, None if sink is None else sink.dtype
        return found, total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, found, total, *more = saved
        states, flat = x.to(weights.dtype), weights.flatten(1, 2)
        mean = (grad * found).sum(-1, keepdim=True) + of_total * total
        dscores = (grad.flatten(1, 2) @ states.transpose(1, 2)).view_as(weights)
        dscores = dscores.add_(of_total - mean).mul_(weights)
        dstates = large_pages(torch.empty_like(states))
        torch.bmm(flat.transpose(1, 2), grad.flatten(1, 2), out=dstates)
        dasks = None
        if more:
            dstates.baddbmm_(dscores.flatten(1, 2).transpose(1, 2), more[0].flatten(1, 2))
            dasks = (dscores.flatten(1, 2) @ states).view_as(more[0])
        dsink = None if ctx.sink is None else ((total - 1) * mean).sum((0, 2, 3)).to(ctx.sink)
        dscores = dscores.sum(-1, keepdim=True) if ctx.one_score else dscores
        return dscores, dasks, dstates.to(x.dtype), None, dsink


class _Put(torch.autograd.Function):
    """Some rows in the place of others, in one copy each way."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
        index = columns.expand_as(rows)
        ctx.save_for_backward(index, valid)
        return out.clone().scatter_(2, index, rows.where(valid, out.gather(2, index)))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        index, valid = saved
        rows = grad.gather(2, index)
        return grad.clone().scatter_(2, index, rows.masked_fill(valid, 0)), rows.masked_fill(~valid, 0), None, None
