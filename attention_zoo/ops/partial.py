"""Partial attention: some of the keys now, the others elsewhere, merged exactly. The heart of every efficient path.

A part returns its output and the log-sum-exp of its scores; two parts merge into what one softmax over both gives. In
backward each part is run with the *merged* output and log-sum-exp, so that the parts' gradients simply add and nothing
but these two tensors is ever saved: memory is O(L·D).

On CPU a part is torch's fused flash kernel, called below autograd because its log-sum-exp is not differentiable there.
Elsewhere, and where that private operator is missing, it is two matrix products (`FUSED` says which one runs).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
FUSED = _forward is not None and _backward is not None
"""Whether this torch has the fused CPU operator; a test sets it to False to run the other path."""


def partial(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """Attention over these keys, without autograd.

    Args:
        bias: added to the scaled scores; -inf hides a key.

    Returns:
        out in float32 at least (zeros where a row sees nothing) and lse, the log-sum-exp of the row's scores
        (-inf where it sees nothing).
    """
    q, k, v, bias = _exact(q, k, v, bias)
    if not q.numel() or not k.shape[2]:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    if FUSED and q.device.type == "cpu":
        out, lse = _forward(q, k, v, 0.0, False, attn_mask=bias, scale=scale)  # type: ignore[misc]
        if bias is not None:
            # The operator reports 0 for rows that see nothing: a wrong weight in a merge.
            seen = bias.amax(-1) > -torch.inf  # 15 times faster than any()
            lse = torch.where(seen, lse, -torch.inf)
        return out, lse
    scores = _scores(q, k, bias, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - _finite(lse)[..., None]).exp()
    return _heads_matmul(weights, v), lse


def partial_backward(
    grad: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    out: Float[Tensor, "B H L D"],
    lse: Float[Tensor, "B H L"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of dq, dk, dv, in float32 at least.

    Args:
        grad: of the merged output.
        out, lse: of the merged attention, as `merge` left them.
    """
    q, k, v, bias = _exact(q, k, v, bias)
    grad, out = grad.to(q.dtype), out.to(q.dtype)
    if not q.numel() or not k.shape[2]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = _finite(lse)  # a row that sees nothing: exp(-inf - 0) is zero, exp(-inf + inf) is not
    if FUSED and q.device.type == "cpu":
        return _backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)  # type: ignore[misc]
    weights, dscores = weights_and_gradient(grad, q, k, v, out, lse, bias, scale=scale)
    dq = _heads_matmul(dscores, k) * scale
    return dq, _group_sum(dscores.transpose(-1, -2) @ q, k) * scale, _group_sum(weights.transpose(-1, -2) @ grad, v)


def weights_and_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, *, scale: float
) -> tuple[Float[Tensor, "B H L S"], Float[Tensor, "B H L S"]]:
    """Attention weights of one part and the gradient of its scores (before `scale`): what a learned bias receives."""
    weights = (_scores(q, k, bias, scale) - _finite(lse)[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    return weights, weights * (_heads_matmul(grad, v.transpose(-1, -2)) - delta)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts over disjoint keys into the attention over both."""
    total = torch.logaddexp(lse, more_lse)
    anchor = _finite(total)
    old, new = (lse - anchor).exp()[..., None], (more_lse - anchor).exp()[..., None]
    return out * old + more * new, total


def _exact(*tensors: Tensor | None) -> list:
    """Float32 at least: half-precision tiles cost more on CPU, and lose the sums everywhere."""
    first = tensors[0]
    assert first is not None
    dtype = torch.promote_types(first.dtype, torch.float32)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, torch.zeros((), dtype=lse.dtype, device=lse.device), lse)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = _heads_matmul(q, k.transpose(-1, -2)) * scale
    return scores if bias is None else scores + bias


def _heads_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[B,H,L,X] @ [B,K,X,Y], where consecutive H share one K."""
    groups = a.shape[1] // b.shape[1]
    return a @ (b if groups == 1 else b.repeat_interleave(groups, 1))


def _group_sum(x: Tensor, like: Tensor) -> Tensor:
    """Gradients of query heads that share a key head, added."""
    groups = x.shape[1] // like.shape[1]
    return x if groups == 1 else x.unflatten(1, (like.shape[1], groups)).sum(2)
