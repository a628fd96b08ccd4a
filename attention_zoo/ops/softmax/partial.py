"""Partial attention: some of the keys now, the others elsewhere, merged exactly. The heart of every efficient path.

Parts over disjoint keys are added to the same `Sums`, which end in the output and the log-sum-exp of one softmax over
all of them. In backward each part is run with that merged log-sum-exp, so that the parts' gradients simply add and
nothing but output and log-sum-exp is ever saved: memory is O(L·D).

Each step is matrix products over all heads at once, and as few passes over the scores between them as can be. That
makes this as fast on a CPU as torch's fused kernel forward, and faster backward, without a private operator:

- the exponential is base 2, and its factor rides along with the product: it takes 0.3 ns whatever the score is, where
  base e takes 0.2, but 4 to 19 of a key that is hidden or far below the others (measured with AVX-512; with base e
  whole calls took 1.01 to 1.20 times as long);
- what is added to the scores stands in their memory before the product does, which adds to it (zeros too: MKL fills
  them in more slowly than `zero_`);
- rows whose scores are known to be small (ops/pattern/mild.py) take their exponentials as they are: where all rows of
  a part are such, nobody looks for their largest scores or subtracts them;
- scores live in a `Scratch` that all steps of a call share: fresh memory costs as much as the arithmetic on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG2E = math.log2(math.e)
LOWEST = -1e30
"""Instead of -inf, since -inf - -inf would be NaN."""


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
                views.clear()
                views[shape] = self._whole[name] = like.new_empty(shape)
            else:
                views[shape] = whole.view(-1)[:count].view(shape)
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
        self.like = q.new_empty((), dtype=torch.promote_types(q.dtype, torch.float32))
        self.shape, self.scratch, self.mild, self.empty = q.shape, scratch, mild, True
        self.shifted = not (mild if isinstance(mild, bool) else bool(mild.all()))
        if self.shifted:
            self._rows("shift").fill_(LOWEST)  # of the exponents, base 2

    def start(self, exponents: Float[Tensor, "#B #H #L m"], values: Float[Tensor, "B H m D"] | None = None) -> None:
        """With keys before all others.

        Args:
            exponents: log2(e) · their scores.
            values: theirs; None: zeros, so that the keys take weight and give nothing.
        """
        one, total = exponents.shape[3] == 1, self._rows("weights")
        weights = total if one else self.scratch("first", (*self.shape[:3], exponents.shape[3]), self.like)
        weights.copy_(exponents)
        if self.shifted:
            shift = torch.amax(weights, -1, keepdim=True, out=self._rows("shift")).clamp_(min=LOWEST)
            if isinstance(self.mild, Tensor):
                shift.masked_fill_(self.mild, 0)
            weights.sub_(shift)
        weights.exp2_()  # in place both ways: of rows that lie apart torch computes other last bits
        into = self.scratch("values", self.shape, self.like)
        if not one:
            torch.sum(weights, -1, keepdim=True, out=total)
        if values is None:
            into.zero_()
        elif one:
            torch.mul(weights, values, out=into)
        else:
            torch.bmm(weights.flatten(0, 1), values.flatten(0, 1), out=into.flatten(0, 1))
        self.empty = False

    def add(
        self,
        q: Float[Tensor, "N n D"],
        k: Float[Tensor, "N m D"],
        v: Float[Tensor, "N m D"],
        bias: Float[Tensor, "#B #h #l #m"] | None = None,
        *,
        scale: float,
        shape: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """Add these keys. The N · n rows are the queries, in the order of memory.

        Args:
            bias: added to the scaled scores; -inf hides a key.
            shape: of the rows that the bias is for, (B, h, l).
        """
        if not q.numel() or not k.shape[1]:
            return
        q, k, v = _exact(q), _exact(k), _exact(v)
        weights = exponents(q, k, bias, None, scale=scale, shape=shape, scratch=self.scratch)
        rows = weights.shape[:2]
        total, values = self._rows("weights", rows), self.scratch("values", q.shape, self.like)
        if self.shifted:
            shift = self._rows("shift", rows)
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
        values.baddbmm_(weights, v, beta=0 if self.empty else 1)
        self.empty = False

    def end(
        self, into: Float[Tensor, "B H L D"] | None = None
    ) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L 1"]]:
        """Output (zeros where a row saw nothing) and log-sum-exp of the scores (-inf there). Overwrites the sums.

        Args:
            into: where the output goes, of any layout and floating dtype; default the scratch.
        """
        values, weights = self.scratch("values", self.shape, self.like), self._rows("weights")
        into = values if into is None else into
        if self.empty:
            return into.zero_(), weights.fill_(-torch.inf)
        torch.div(values, weights.clamp(min=1e-30), out=into)
        lse = weights.log_()
        return into, lse.add_(self._rows("shift"), alpha=1 / LOG2E) if self.shifted else lse

    def _rows(self, name: str, rows: tuple[int, ...] | None = None) -> Tensor:
        """One number a row."""
        return self.scratch(name, (*(self.shape[:3] if rows is None else rows), 1), self.like)


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
    B, H, L, _ = q.shape
    sums.add(fold(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1), bias, scale=scale, shape=(B, H, L))
    return sums.end()


class Asked(NamedTuple):
    """Rows that a gradient has come back for.

    Fields:
        grad: of the merged output.
        q: queries.
        delta: -(grad · merged output), summed over D.
        shift: -log2(e) · log-sum-exp of the merged attention; but -inf for rows that see nothing, which makes their
            weights exactly zero.
    """

    grad: Float[Tensor, "*rows D"]
    q: Float[Tensor, "*rows D"]
    delta: Float[Tensor, "*rows 1"]
    shift: Float[Tensor, "*rows 1"]


def partial_backward(
    asked: Asked,
    k: Float[Tensor, "N m D"],
    v: Float[Tensor, "N m D"],
    bias: Float[Tensor, "#B #h #l #m"] | None = None,
    *,
    scale: float,
    into: tuple[Float[Tensor, "N n D"], Float[Tensor, "N m D"], Float[Tensor, "N m D"]],
    shape: tuple[int, int, int] = (1, 1, 1),
    scratch: Scratch | None = None,
    fresh: bool = False,
) -> Float[Tensor, "N n m"]:
    """Add this part's share of dq, dk, dv to `into`, in place.

    Args:
        asked: rows [N, n].
        shape: of the rows that the bias is for, (B, h, l).
        fresh: overwrite dk and dv, whatever they hold, instead of adding to them.

    Returns:
        The gradient of the scores (before `scale`): what a learned bias receives. In the scratch.
    """
    scratch = scratch or Scratch()
    grad, q, k, v = _exact(asked.grad), _exact(asked.q), _exact(k), _exact(v)
    dq, dk, dv = into
    if not q.numel() or not k.shape[1]:
        if fresh:
            dk.zero_()
            dv.zero_()
        return q.new_empty(*q.shape[:2], k.shape[1])
    weights = exponents(q, k, bias, asked.shift, scale=scale, shape=shape, scratch=scratch).exp2_()
    dscores = scratch("dscores", weights.shape, q).copy_(asked.delta)
    dscores.baddbmm_(grad, v.transpose(1, 2)).mul_(weights)
    beta = 0 if fresh else 1
    dq.baddbmm_(dscores, k, alpha=scale)
    dk.baddbmm_(dscores.transpose(1, 2), q, beta=beta, alpha=scale)
    dv.baddbmm_(weights.transpose(1, 2), grad, beta=beta)
    return dscores


def exponents(
    q: Float[Tensor, "N n D"],
    k: Float[Tensor, "N m D"],
    bias: Float[Tensor, "#B #h #l #m"] | None,
    shift: Float[Tensor, "N n 1"] | None,
    *,
    scale: float,
    shape: tuple[int, int, int],
    scratch: Scratch,
) -> Float[Tensor, "N n m"]:
    """log2(e) · (scale · q·k + bias) + shift. The bias is for rows of this shape, (B, h, l)."""
    found = scratch("scores", (*q.shape[:2], k.shape[1]), q)
    # the product is added to what is there already: no pass of its own
    if bias is not None:
        inside = scratch("scores", (*shape, k.shape[1]), q)
        if shift is None:
            torch.mul(bias.expand(inside.shape), LOG2E, out=inside)
        else:
            torch.add(shift.view(*shape, 1), bias, alpha=LOG2E, out=inside)
    elif shift is not None:
        found.copy_(shift)
    else:
        found.zero_()
    return found.baddbmm_(q, k.transpose(1, 2), alpha=scale * LOG2E)


def fold(x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "N n d"]:
    """Rows as products want them: those of each of a sequence's groups of heads together, N = B · groups."""
    B, H, L, width = x.shape
    return x.reshape(B * groups, H * L // groups, width)


def add_product(into: Float[Tensor, "B H n D"], a: Float[Tensor, "N n m"], b: Float[Tensor, "N m D"]) -> None:
    """into += a @ b, without a temporary where the heads of `into` are those of the product."""
    B, H, n, D = into.shape
    if a.shape[0] == B * H and (B == 1 or H == 1 or into.stride(0) == H * into.stride(1)):
        into.view(B * H, n, D).baddbmm_(a, b)
    else:
        into.add_((a @ b).view(into.shape))


def _exact(x: Tensor) -> Tensor:
    """Float32 at least: half-precision tiles cost more on CPU, and lose the sums everywhere."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
