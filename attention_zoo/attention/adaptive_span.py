"""Adaptive span: each head learns how far it looks back. Sukhbaatar, Grave, Bojanowski & Joulin 2019, "Adaptive
Attention Span in Transformers", §3.

A soft ramp over distance hides what is far: it falls from 1 at the head's span z to 0 at z + R. The span is learned by
gradients through the ramp, a loss on it asks for short ones, and what a head does not see is neither computed nor kept.

    m_z(d) = clamp((R + z - d) / R, 0, 1)
    a_j    = m_z(i - j) · e^s_j / Σ m_z(i - k) · e^s_k,      which is softmax of  s_j + log m_z(i - j)
    loss   = λ · mean over heads of z, each layer's, summed over depth

O(L · (z + R)) time, head by head, and a state of z + R columns.

Paper: the distance of the token before is 0, and a token does not attend to itself; z is at most S, R = 32, λ = 2e-6.

Released code (facebookresearch/adaptive-span, CC-BY-NC: nothing is taken from it): learns z / S and clamps it to 0..1
after each optimiser step, adds 1e-8 to the denominator, and trims keys in units of 64 by the layer's largest span.

Here: as in the released code the parameter is z / S, so that a learning rate fit for weights moves spans by tokens a
step; `after_step` clamps it, which the trainer calls (a loop of your own must). A token sees itself, at distance 0;
`own_token=False` is the paper's convention, in which a document's first token sees nothing and gets zeros. Nothing is
added to the denominator. Heads are cut by their own spans, in groups of similar ones. Two-sided, the distance counts on
both sides. Spans are fixed while a state lives; should training change them between two calls of a stream, what a grown
span no longer finds is not seen.

When: where some heads need a long past and most do not, and nobody knows which; a fixed window is as fast and simpler
where all need the same. Heads that should reach far must first learn to from near: the ramp is where gradients come
from, so that evidence far beyond span and ramp is found late or never; begin with `start` at the limit there. On Python
source (task=text model=tiny model.heads=4 attention.limit=512 steps=600, one seed) 2.84 bits per byte beside 2.91 of
full, with spans of 0, 0, 0, 79 and 0, 56, 0, 103 tokens; after 300 steps of 8 x 512 (model=tiny) 3.067 beside 3.075 of
a window as wide as the limit. On recall whose questions stand anywhere (task=mqar task.power=1 model.heads=4
attention.limit=64 attention.ramp=8, 600 steps, one seed) 11 % begun at span 0, and 100 % with attention.start=64, where
spans come down to 55..56 tokens in the first layer and 37..40 in the second.

Checked: against the paper's formula, weights times exponentials over their sum, by a loop over single pairs in
float64: outputs to 1e-12 and gradients to 1e-11, spans' included, in both conventions, with padding, holes, documents
and grouped heads (tests/test_adaptive_span.py). There is no foreign package; the released code may not be copied.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.reach import Band
from attention_zoo.ops.softmax.function import differentiable_once
from attention_zoo.options import NonNegative, Positive

_alive: WeakSet[AdaptiveSpan] = WeakSet()


def _read_all(device: torch.device) -> None:
    """Read the spans of all layers there that have changed: a stack waits for its device once a step, not once a layer.

    Of a parameter without values nothing is read: it reaches as far as it may.
    """
    stale = [layer for layer in list(_alive) if layer.span.device == device and layer._is_stale]
    now = [layer._now for layer in stale]
    with torch.no_grad():
        ends = [layer._ends().double() for layer in stale]
    numbers = [layer.limit + layer.ramp for layer in stale for _ in range(layer.heads)]
    found = iter(numbers if device.type == "meta" else torch.cat(ends).tolist())
    for layer, key in zip(stale, now):
        layer._learn_reach(key, [next(found) for _ in range(layer.heads)])


_FAR = 2**40
"""Positions apart, farther than any span."""


class _Ramp(torch.autograd.Function):
    """log clamp(left / ramp, 0, 1), without a gradient where it is hidden or flat.

    In few operators: a table of it is made at each call.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, ramp: int) -> Tensor:
        ctx.save_for_backward(left.masked_fill((left <= 0) | (left > ramp), torch.inf))
        return (left / ramp).clamp_(0, 1).log_()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        (left,) = saved
        return grad / left, None


class AdaptiveSpan(PatternAttention):
    """Attention with a learned span for each head.

    Args:
        limit: longest span S in tokens.
        ramp: tokens R over which a key's weight falls to zero beyond the span.
        start: span in tokens with which every head begins; at most limit.
        span_loss: weight λ of the mean span, in tokens, in the loss.
        own_token: whether a token attends to itself, at distance 0. False: the paper's convention.
        sink_logit: learn for each head the score of one more key, whose value is zero; see `full`.
        kernel: auto | row | banded | tiles | flex | dense.
        shared: the options of `Attention`.
    """

    name = "adaptive_span"
    tiny = {"limit": 11, "ramp": 2, "start": 4.0}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="none",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        positions=("none", "rotary", "alibi"),
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        limit: Positive = 4096,
        ramp: Positive = 32,
        start: NonNegative = 0.0,
        span_loss: NonNegative = 2e-6,
        own_token: bool = True,
        sink_logit: bool = False,
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(sink_logit=sink_logit, kernel=kernel, **shared)
        if start > limit:
            raise ValueError(f"start must be at most limit, got start={start:g} for limit={limit}")
        self.limit, self.ramp, self.span_loss, self.own_token = limit, ramp, span_loss, own_token
        self.span = nn.Parameter(torch.full((self.heads,), start / limit))
        self._read: tuple[Any, Band] | None = None

        _alive.add(self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._read = None
        _alive.add(self)

    # --- spans -----------------------------------------------------------------------------------------------------

    def _spans(self) -> Float[Tensor, " H"]:
        """z of each head in tokens, differentiable; in float32 at least, since bfloat16 counts to 256."""
        wide = self.span.dtype if self.span.dtype.itemsize > 2 else torch.float32
        return self.span.to(wide).clamp(0, 1) * self.limit

    def _ends(self) -> Float[Tensor, " H"]:
        """The distance at which each head's ramp has come to zero."""
        return self._spans() + (self.ramp if self.own_token else self.ramp + 1)

    @property
    def spans(self) -> list[float]:
        """The span of each head, in tokens, without its ramp."""
        ends = self.ramp if self.own_token else self.ramp + 1
        return [end - ends for end in self._ends().tolist()]

    @property
    def reach(self) -> Band:  # type: ignore[override]
        """As far as each head sees now."""
        if self._is_stale:
            _read_all(self.span.device)
        assert self._read is not None
        return self._read[1]

    @property
    def _now(self) -> tuple[Any, ...]:
        """What the reach that was read last was read from; spans that are changed in place have another version."""
        span = self.span
        version = None if span.is_inference() else span._version
        return span.data_ptr(), version, span.dtype, span.device, self.limit, self.ramp, self.own_token

    @property
    def _is_stale(self) -> bool:
        return self._read is None or self.span.is_inference() or self._read[0] != self._now

    def _learn_reach(self, now: tuple[Any, ...], ends: list[float]) -> None:
        # a whole distance below the end, by the very arithmetic of `bias`; a span that is NaN shows in the loss
        back = tuple(math.ceil(end) - 1 if end == end else 0 for end in ends)
        self._read = now, Band(back[0] if len(set(back)) == 1 else back, weights="distance")

    def after_step(self) -> None:
        """Clamp the spans to their range, as has to be done whenever an optimizer has moved them."""
        with torch.no_grad():
            self.span.clamp_(0, 1)

    def readings(self) -> dict[str, list[float]]:
        """What is worth following in training: spans in tokens, head by head."""
        return {"span": self.spans}

    # --- the pattern -----------------------------------------------------------------------------------------------

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "#B #H L S"]:
        """Log of the ramp."""
        ends = self._ends().view(-1, 1, 1)
        distance = (queries.position[:, :, None] - keys.position[:, None, :])[:, None].abs()
        if not self.own_token:
            distance = distance.masked_fill(distance == 0, _FAR)
        ramp: Tensor = _Ramp.apply(ends - distance, self.ramp)
        return ramp

    def bias_parameters(self) -> tuple[Tensor, ...]:
        return (self.span,)

    def losses(self) -> dict[str, Tensor]:
        """The mean span, weighed."""
        return {"span": self.span_loss * self._spans().mean()} if self.span_loss else {}
