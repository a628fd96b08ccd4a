"""Partial attention: some of the keys now, the others elsewhere, merged exactly. The heart of every efficient path.

A part returns its output and the log-sum-exp of its scores; two parts merge into what one softmax over both gives. In
backward each part is run with the *merged* log-sum-exp, so that the parts' gradients simply add and nothing but output
and log-sum-exp is ever saved: memory is O(L·D).

Each step is matrix products over all heads at once, and as few passes over the scores between them as can be. Two
things make this as fast on a CPU as torch's fused kernel forward, and faster backward, without a private operator: the
exponential is base 2 (half the cost of base e there), its factor riding along with the subtraction before it; and
scores live in a `Scratch` that all steps of a call share, since fresh memory costs as much as the arithmetic on it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOG2E = math.log2(math.e)


class Scratch:
    """Memory that the steps of one call reuse, one piece for each name. What it gives out is uninitialised."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Contiguous, in the dtype and on the device of `like`; valid until the name is asked for again."""
        last = self._last.get(name)
        if last is not None and last.shape == shape:
            return last
        whole, count = self._whole.get(name), math.prod(shape)
        if whole is None or whole.numel() < count:
            whole = self._whole[name] = like.new_empty(count)
        self._last[name] = whole[:count].view(shape)
        return self._last[name]


def partial(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
    scratch: Scratch | None = None,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L 1"]]:
    """Attention over these keys, without autograd.

    Args:
        bias: added to the scaled scores; -inf hides a key.

    Returns:
        out in float32 at least (zeros where a row sees nothing) and lse, the log-sum-exp of the row's scores
        (-inf where it sees nothing).
    """
    q, k, v = (_exact(x) for x in (q, k, v))
    if not q.numel() or not k.shape[2]:
        return torch.zeros_like(q), q.new_full((*q.shape[:3], 1), -torch.inf)
    weights = scores(q, k, bias, scale=scale, scratch=scratch or Scratch())
    peak = weights.amax(-1, keepdim=True).clamp_(min=-1e30)  # -inf - -inf would be NaN
    torch.add(peak * -LOG2E, weights, alpha=LOG2E, out=weights).exp2_()
    total = weights.sum(-1, keepdim=True)
    lse = peak.add_(total.log())
    out = torch.bmm(weights, v.flatten(0, 1)).div_(total.clamp_(min=1e-30))
    return out.view(q.shape), lse.view(*q.shape[:3], 1)


def partial_backward(
    grad: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    delta: Float[Tensor, "B H L 1"],
    lse: Float[Tensor, "B H L 1"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
    into: tuple[Float[Tensor, "B H L D"], Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]],
    scratch: Scratch | None = None,
    fresh: bool = False,
) -> Float[Tensor, "B H L S"]:
    """Add this part's share of dq, dk, dv to `into`, in place.

    Args:
        grad: of the merged output.
        delta: grad · merged output, summed over D.
        lse: of the merged attention, as `merge` left it; but +inf for rows that see nothing, which makes their weights
            exactly zero.
        fresh: overwrite dk and dv, whatever they hold, instead of adding to them.

    Returns:
        The gradient of the scores (before `scale`): what a learned bias receives. In the scratch.
    """
    scratch = scratch or Scratch()
    grad, q, k, v = (_exact(x) for x in (grad, q, k, v))
    if not q.numel() or not k.shape[2]:
        if fresh:
            into[1].zero_()
            into[2].zero_()
        return q.new_empty(*q.shape[:3], k.shape[2])
    weights = scores(q, k, bias, scale=scale, scratch=scratch)
    heads, rows, _ = weights.shape
    torch.add(lse.reshape(heads, rows, 1) * -LOG2E, weights, alpha=LOG2E, out=weights).exp2_()
    dscores = scratch("dscores", weights.shape, q).copy_(delta.reshape(heads, rows, 1))
    D = q.shape[3]
    grad, q, k, v = grad.reshape(heads, rows, D), q.reshape(heads, rows, D), k.flatten(0, 1), v.flatten(0, 1)
    dscores.baddbmm_(grad, v.transpose(1, 2), beta=-1).mul_(weights)
    dq, dk, dv = into
    add_product(dq, dscores, k, scale)
    add_product(dk, dscores.transpose(1, 2), q, scale, fresh=fresh)
    add_product(dv, weights.transpose(1, 2), grad, fresh=fresh)
    return dscores.view(*dq.shape[:3], k.shape[1])


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts over disjoint keys into the attention over both. Overwrites `out` and `more`."""
    total = torch.logaddexp(lse, more_lse)
    anchor = total.clamp(min=-1e30)
    return out.mul_((lse - anchor).exp_()).add_(more.mul_((more_lse - anchor).exp_())), total


def scores(
    q: Float[Tensor, "B H L D"], k: Float[Tensor, "B K S D"], bias: Tensor | None, *, scale: float, scratch: Scratch
) -> Float[Tensor, "BK HL S"]:
    """scale · q·k + bias, where consecutive query heads share a key head: their rows stand one after another."""
    (B, H, L, D), (K, S) = q.shape, k.shape[1:3]
    found = scratch("scores", (B * K, H // K * L, S), q)
    if bias is not None:
        found.view(B, H, L, S).copy_(bias)
    # the product is added to what is there already: no pass of its own
    return found.baddbmm_(
        q.reshape(B * K, -1, D), k.flatten(0, 1).transpose(1, 2), beta=0 if bias is None else 1, alpha=scale
    )


def add_product(
    into: Float[Tensor, "B H n D"],
    a: Float[Tensor, "N n m"],
    b: Float[Tensor, "N m D"],
    alpha: float = 1.0,
    *,
    fresh: bool = False,
) -> None:
    """into += alpha · a @ b, without a temporary where the heads of `into` are those of the product.

    With `fresh`, into = alpha · a @ b.
    """
    B, H, n, D = into.shape
    if a.shape[0] == B * H and (B == 1 or H == 1 or into.stride(0) == H * into.stride(1)):
        into.view(B * H, n, D).baddbmm_(a, b, beta=0 if fresh else 1, alpha=alpha)
    else:
        into = into.zero_() if fresh else into
        into.add_((a @ b).view(into.shape), alpha=alpha)


def _exact(x: Tensor) -> Tensor:
    """Float32 at least: half-precision tiles cost more on CPU, and lose the sums everywhere."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
