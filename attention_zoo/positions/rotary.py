"""Rotary positions: turn each pair of channels by an angle that grows with position. Su et al. 2021, eq. 34.

The two halves of a head form the pairs (x_i, x_{i + D/2}), as in the Llama family, not neighbouring channels.

A model is stretched to longer texts by slowing its pairs down: all by the same factor (`linear`: Chen et al. 2023), or
only those whose wavelength the training length did not hold (`llama3`: the released Llama 3.1), with a ramp between.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from attention_zoo.layout.kernel import triton_reason
from attention_zoo.layout.layout import Layout
from attention_zoo.options import LARGEST, Finite
from attention_zoo.positions.scheme import AttentionPositions
from attention_zoo.rules import OneOf

Above = Annotated[float, Field(gt=0, allow_inf_nan=False, description="above 0")]


class Rotary(AttentionPositions):
    """`rotate(x, position)` keeps norms, and q·k depends on the difference of positions alone.

    Args:
        base: wavelength of the slowest pair over 2π, in tokens.
        scaling: none | linear | llama3.
        factor: by how much pairs are slowed down.
        low_freq_factor, high_freq_factor: llama3 slows a pair that turns less than `low` times within
            `original_length` tokens by the whole factor, and one that turns more than `high` times not at all.
        original_length: tokens of the training before stretching.
    """

    rotates = True
    options = ("base", "scaling", "factor", "low_freq_factor", "high_freq_factor", "original_length")

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        base: Above = 10_000.0,
        scaling: Annotated[str, OneOf("none", "linear", "llama3")] = "none",
        factor: Above = 1.0,
        low_freq_factor: Finite = 1.0,
        high_freq_factor: Finite = 4.0,
        original_length: Annotated[int, Field(gt=0, le=LARGEST, description="above 0")] = 8192,
    ):
        super().__init__(heads=heads, head_width=head_width)
        if head_width % 2:
            raise ValueError(f"positions=rotary needs an even head_width, got {head_width}")
        for name, value in (("base", base), ("factor", factor)):
            if value < 1e-6:
                raise ValueError(f"positions.{name} must be at least 1e-06, so that angles are finite, got {value!r}")
        if not 0 < low_freq_factor < high_freq_factor:
            raise ValueError(
                f"positions.low_freq_factor must be above 0 and below high_freq_factor, got {low_freq_factor!r} "
                f"and {high_freq_factor!r}"
            )
        self.base, self.scaling, self.factor = base, scaling, factor
        self.turns = (low_freq_factor, high_freq_factor)
        self.original_length = original_length

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        return _turned(x, *_beside(x, *self.angles(position, x.dtype)))

    def turn(self, x: Tensor, layout: Layout) -> Tensor:
        key = "angles", self.head_width, self.base, self.scaling, self.factor, self.turns, self.original_length, x.dtype
        made = layout.plan((*key, x.ndim), lambda: _beside(x, *self.angles(layout.position, x.dtype)))
        return _turned(x, *made)

    def angles(self, position: Int[Tensor, "B L"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each pair's angle, [B, L, D/2]."""
        # angles in float32 at least: bfloat16 cannot count past 256
        exact = torch.promote_types(dtype, torch.float32)
        with torch.inference_mode(False):  # they may outlive the call
            angle = position.to(exact)[..., None] * self.steps(position.device, exact)
            return angle.cos().to(dtype), angle.sin().to(dtype)

    def steps(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[D/2], the angle in radians by which each pair turns from one position to the next."""
        # in this order of operations, since pretrained models know its rounding: at position 10⁴ it is seen
        step = 1.0 / (self.base ** (torch.arange(0, self.head_width, 2, device=device, dtype=dtype) / self.head_width))
        if self.scaling == "none":
            return step
        if self.scaling == "linear":
            return step / self.factor
        low, high = self.turns
        turns = self.original_length / (2 * math.pi / step)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * step / self.factor + share * step


def _beside(x: Float[Tensor, "B ... L D"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What each channel is multiplied by, and what its partner is, [B, ..., L, D] for every head of x."""
    shape = len(cos), *[1] * (x.ndim - 3), cos.shape[1], x.shape[-1]
    with torch.inference_mode(False):  # they may outlive the call
        return torch.cat([cos, cos], -1).view(shape), torch.cat([-sin, sin], -1).view(shape)


def _turned(x: Float[Tensor, "B ... L D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B ... L D"]:
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        out: Tensor = _Turn.apply(x, cos, sin, 1, _dense(x))
        return out
    return _mixed(x, cos, sin, 1)


def _mixed(x: Tensor, cos: Tensor, sin: Tensor, way: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """Few operators, since short calls wait for the host; no pair is cut apart and put together again.

    Args:
        strides: of the output; default those that it has by itself.
    """
    moved = strides is not None and x.stride() != strides
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device) if moved else None  # type: ignore[arg-type]
    if triton_reason(x.device) is None and not torch.compiler.is_compiling():
        from attention_zoo.ops.triton import pairs

        if pairs.takes(x, cos, sin):
            return pairs.turned(x, cos, sin, way, torch.empty_like(x) if out is None else out)
    if out is None:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=way)
    return torch.mul(x, cos, out=out).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=way)


def _dense(x: Tensor) -> tuple[int, ...] | None:
    """Its strides, where it is what a projection writes, seen by heads: so its gradient has to lie for that, too."""
    if x.ndim != 4:
        return None
    _, H, L, D = x.shape
    return x.stride() if x.stride() == (L * H * D, D, H * D, 1) else None


class _Turn(torch.autograd.Function):
    """Its gradient is turned back, into memory as x lies. Only angles are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, way: int, strides: tuple[int, ...] | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.way, ctx.strides = way, strides
        return _mixed(x, cos, sin, way, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Turn.apply(grad, *ctx.saved_tensors, -ctx.way, ctx.strides), None, None, None, None
