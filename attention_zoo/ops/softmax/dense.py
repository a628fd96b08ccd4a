"""The oracle: softmax(scale · QKᵀ + bias) V with everything materialised, differentiable by plain autograd.

O(L·S) time and memory. What every fast path is compared with; float64-safe.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def dense(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
    sink: Float[Tensor, "H *rows"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """Attention by definition; rows that see nothing (-inf everywhere) yield zeros and finite gradients.

    With fewer key/value heads than query heads, consecutive query heads share one (H must be a multiple of K).

    Args:
        sink: for each head, or each of its rows, the score of one more key, whose value is zero: it takes
            weight and gives nothing.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # float32 inside for half types, as every fused kernel does
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(exact) @ k.to(exact).transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(exact)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(exact).min)
    if sink is not None:
        sink = sink.to(exact).view(q.shape[1], -1, 1)
        peak = torch.maximum(peak, sink.detach())
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - peak).exp()
    total = torch.where(total == 0, 1, total)  # a clamp to the smallest number would square to zero in backward
    return ((weights / total) @ v.to(exact)).to(q.dtype)
