"""Partial attention: some of the keys now, the others elsewhere, merged exactly. The heart of every efficient path.

Parts over disjoint keys are added to the same `Sums`, which end in the output and the log-sum-exp of one softmax over
all of them. In backward each part is run with that merged log-sum-exp, so that the parts' gradients simply add and
nothing but output and log-sum-exp is ever saved: memory is O(L·D).

Each step is matrix products over all heads at once, and as few passes over the scores between them as can be. That
makes this as fast on a CPU as torch's fused kernel forward, and faster backward, without a private operator:

- the exponential is base 2 (half the cost of base e there), and its factor rides along with the product;
- what is added to the scores stands in their memory before the product does, which adds to it (zeros too: MKL fills
  them in more slowly than `zero_`);
- rows whose scores are known to be small (ops/mild.py) take their exponentials as they are: where all rows of a part
  are such, nobody looks for their largest scores or subtracts them;
- scores live in a `Scratch` that all steps of a call share: fresh memory costs as much as the arithmetic on it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG2E = math.log2(math.e)
_LOWEST = -1e30  # instead of -inf, since -inf - -inf would be NaN


class Scratch:
    """Memory that the steps of one call reuse, one piece for each name. What it gives out is uninitialised."""

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[int, ...], Tensor]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Contiguous, in the dtype and on the device of `like`; valid until the name is asked for again."""
        views = self._views.setdefault(name, {})
        if shape not in views:
            whole, count = self._whole.get(name), math.prod(shape)
            if whole is None or whole.numel() < count:
                whole = self._whole[name] = like.new_empty(count)
                views.clear()
            views[shape] = whole[:count].view(shape)
        return views[shape]


class Sums:
    """A softmax over parts that are added one after the other (Milakov and Gimelshein 2018, online softmax).

    Exponentials are relative to each row's largest score so far; in rows that are mild they are taken as they are, so
    that such a row is computed alike to the last bit, whatever the others are.
    """

    def __init__(self, q: Float[Tensor, "B H L D"], scratch: Scratch, mild: Bool[Tensor, "B H L 1"] | bool = False):
        """For these queries; sums are float32 at least, in the scratch, so that one object at a time is in use.

        Args:
            mild: rows whose scores are known to be small; True or False: all or none.
        """
        like = q.new_empty((), dtype=torch.promote_types(q.dtype, torch.float32))
        self.scratch, self.mild, self.empty = scratch, mild, True
        self.values, self.weights = (scratch("values", q.shape, like), scratch("weights", (*q.shape[:3], 1), like))
        self.shift: Tensor | None = None  # of the exponents, base 2
        if not (mild if isinstance(mild, bool) else bool(mild.all())):
            self.shift = scratch("shift", self.weights.shape, like).fill_(_LOWEST)

    def add(
        self,
        q: Float[Tensor, "B h l D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        bias: Float[Tensor, "#B #h #l #S"] | None = None,
        *,
        scale: float,
    ) -> None:
        """Add these keys. Rows may be grouped into more heads, in the order of memory.

        Args:
            bias: added to the scaled scores; -inf hides a key.
        """
        if not q.numel() or not k.shape[2]:
            return
        q, k, v = (_exact(x) for x in (q, k, v))
        weights = exponents(q, k, bias, scale=scale, scratch=self.scratch)
        rows = weights.shape[:2]
        total, values = self.weights.view(*rows, 1), self.values.view(*rows, -1)
        if self.shift is not None:
            shift = self.shift.view(*rows, 1)
            peak = torch.maximum(weights.amax(-1, keepdim=True), shift)
            if isinstance(self.mild, Tensor):
                peak.masked_fill_(self.mild.reshape(peak.shape), 0)
            weights.sub_(peak)
            if not self.empty:
                factor = shift.sub_(peak).exp2_()
                total.mul_(factor)
                values.mul_(factor)
            shift.copy_(peak)
        weights.exp2_()
        found = weights.sum(-1, keepdim=True)
        total.copy_(found) if self.empty else total.add_(found)
        values.baddbmm_(weights, v.flatten(0, 1), beta=0 if self.empty else 1)
        self.empty = False

    def end(
        self, into: Float[Tensor, "B H L D"] | None = None
    ) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L 1"]]:
        """Output (zeros where a row saw nothing) and log-sum-exp of the scores (-inf there). Overwrites the sums.

        Args:
            into: where the output goes, of any layout and floating dtype; default the scratch.
        """
        into = self.values if into is None else into
        if self.empty:
            return into.zero_(), self.weights.fill_(-torch.inf)
        torch.div(self.values, self.weights.clamp(min=1e-30), out=into)
        lse = self.weights.log_()
        return into, lse if self.shift is None else lse.add_(self.shift, alpha=1 / LOG2E)


def partial(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H #L #S"] | None = None,
    *,
    scale: float,
    scratch: Scratch | None = None,
) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L 1"]]:
    """Attention over these keys alone, without autograd: `Sums` of one part. The results are in the scratch."""
    sums = Sums(q, scratch or Scratch())
    sums.add(q, k, v, bias, scale=scale)
    return sums.end()


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
        lse: of the merged attention, as `Sums` end in; but +inf for rows that see nothing, which makes their weights
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
    weights = exponents(q, k, bias, lse, scale=scale, scratch=scratch).exp2_()
    heads, rows, _ = weights.shape
    dscores = scratch("dscores", weights.shape, q).copy_(-delta.reshape(heads, rows, 1))
    D = q.shape[3]
    grad, q, k, v = grad.reshape(heads, rows, D), q.reshape(heads, rows, D), k.flatten(0, 1), v.flatten(0, 1)
    dscores.baddbmm_(grad, v.transpose(1, 2)).mul_(weights)
    dq, dk, dv = into
    add_product(dq, dscores, k, scale)
    add_product(dk, dscores.transpose(1, 2), q, scale, fresh=fresh)
    add_product(dv, weights.transpose(1, 2), grad, fresh=fresh)
    return dscores.view(*dq.shape[:3], k.shape[1])


def exponents(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    bias: Float[Tensor, "#B #H #L #S"] | None,
    lse: Float[Tensor, "B H L 1"] | None = None,
    *,
    scale: float,
    scratch: Scratch,
) -> Float[Tensor, "BK HL S"]:
    """log2(e) · (scale · q·k + bias - lse). Consecutive query heads share a key head: their rows stand together."""
    (B, H, L, D), (K, S) = q.shape, k.shape[1:3]
    found = scratch("scores", (B * K, H // K * L, S), q)
    inside = found.view(B, H, L, S)
    # the product is added to what is there already: no pass of its own
    if bias is not None and lse is not None:
        torch.add(lse * -LOG2E, bias, alpha=LOG2E, out=inside)
    elif bias is not None:
        torch.mul(bias.expand(inside.shape), LOG2E, out=inside)
    elif lse is not None:
        inside.copy_(lse * -LOG2E)
    else:
        found.zero_()
    return found.baddbmm_(q.reshape(B * K, -1, D), k.flatten(0, 1).transpose(1, 2), alpha=scale * LOG2E)


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
