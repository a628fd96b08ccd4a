"""A few rows that see any keys, with a bias of any kind and a sink: materialised, in few operators. For GPUs.

Fused attention gives no log-sum-exp by which a sink takes its share, and tiles take many small operators. Only the
output and one log-sum-exp a row are kept for backward, which computes the scores again.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.ops.softmax.function import differentiable_once, without_autocast


def attend_rows(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H n S"],
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H n D"]:
    """Softmax attention of rows each of which sees a key; n x S numbers a head at a time.

    Args:
        bias: added to the scores; it receives no gradient.
        sink: for each head the score of one more key, whose value is zero.
    """
    out: Tensor = _Rows.apply(q, k, v, bias, sink, scale)
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor | None, scale: float) -> Tensor:
        asking, keys, values = _by_key_head(q, k, v)
        scores = _scores(asking * scale, keys, bias, q.shape)
        lse = scores.logsumexp(-1, keepdim=True)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.to(lse.dtype).view(-1, 1, 1))
        out = torch.bmm(scores.sub_(lse).exp_().view(*asking.shape[:2], -1), values)
        ctx.save_for_backward(q, k, v, bias, sink, lse, out)
        ctx.scale = scale
        return out.view(q.shape).to(q.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sink, lse, out = saved
        asking, keys, values = _by_key_head(q, k, v)
        asking = asking * ctx.scale
        weights = _scores(asking, keys, bias, q.shape).sub_(lse).exp_().view(*asking.shape[:2], -1)
        grad = grad.to(lse.dtype).reshape(asking.shape)
        delta = (grad * out).sum(-1, keepdim=True)
        dscores = torch.bmm(grad, values.mT).sub_(delta).mul_(weights)
        dq = torch.bmm(dscores, keys).mul_(ctx.scale)
        dk, dv = torch.bmm(dscores.mT, asking), torch.bmm(weights.mT, grad)
        dsink = None
        if sink is not None:
            shares = (sink.to(lse.dtype).view(-1, 1, 1) - lse).exp_()
            dsink = shares.mul_(delta.view(lse.shape)).sum((0, 2, 3)).neg_().to(sink.dtype)
        found = (each.view(like.shape).to(like.dtype) for each, like in zip((dq, dk, dv), (q, k, v)))
        return *found, None, dsink, None


def _scores(asking: Tensor, keys: Tensor, bias: Tensor, rows: torch.Size) -> Float[Tensor, "B H n S"]:
    return torch.bmm(asking, keys.mT).view(*rows[:3], -1).add_(bias)


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 at least, [N, n, D] and [N, S, D]: rows of all heads that share a key head together."""
    exact, heads = torch.promote_types(q.dtype, torch.float32), k.shape[0] * k.shape[1]
    asking, keys, values = (x.to(exact).reshape(heads, -1, x.shape[3]) for x in (q, k, v))
    return asking, keys, values
