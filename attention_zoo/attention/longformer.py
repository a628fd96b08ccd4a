"""Longformer: a sliding window, and a few global tokens. Beltagy, Peters & Cohan 2020, "Longformer", §3.1.

A token sees the tokens within `window` positions on each side (its own included), in steps of `dilation`, and every
global token; a global token sees everything, through query, key and value projections of its own. O(L·(window + G)).

    i sees j  if  |p_i - p_j| <= window · dilation and dilation divides p_i - p_j,
              or i or j is global;    causal: p_j <= p_i alone

Paper: w is the whole window, w / 2 on each side. Dilation may differ from head to head. Global attention is symmetric
and has projections of its own, which start as copies. Language models are causal, with windows that grow over depth.

Released code (allenai; Hugging Face follows it): allenai's `attention_window` counts one side, Hugging Face's both.
Its chunked form has neither dilation nor a causal form. It takes the softmax in float32 whatever the dtype, and a
global query attends again with what was computed for its window, to be overwritten.

Here: `window` counts one side: Hugging Face's attention_window=512 is window=256. The causal form sees the `window`
tokens before a token, and itself, and global tokens of its past. Dilation is by head, works in every form, and costs no
more than a window without gaps (heads that share a key head but not a dilation excepted). As in the released code, a
key that is both global and in the window counts once, and non-global queries see global keys through the ordinary
projections. `global_projections="shared"` leaves the second projections out. Positions count tokens, not padding.

Checked: against Hugging Face's Longformer (random windows, padding on either side and in holes, global tokens;
dilation on residue classes, since theirs has none) and local-attention (exact windows, causal and two-sided), in
tests/oracles/longformer.py. Largest error of outputs and gradients 7e-7 in float32 and 2e-15 in float64, 3e-7 where
theirs rounds its softmax to float32 (tests/oracles/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.ops.constants import constant
from attention_zoo.ops.dispatch import BANDED, DENSE, TILES, WHOLE_BAND
from attention_zoo.ops.flex import FLEX
from attention_zoo.ops.row import ROW
from attention_zoo.ops.short_band import SHORT_BAND
from attention_zoo.ops.xformers import XFORMERS
from attention_zoo.options import Positive
from attention_zoo.rules import OneOf


class Longformer(PatternAttention):
    """Sliding window attention with global tokens.

    Args:
        window: tokens per side; at least 1.
        dilation: step between the tokens of a window; one number, or one for each head. Reach is window · dilation.
        global_projections: "separate" (the paper) or "shared".
        kernel: auto | row | sdpa | short | flex | banded | xformers | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "longformer"
    tiny = {"window": 3}
    kernels = (ROW, WHOLE_BAND, SHORT_BAND, FLEX, BANDED, XFORMERS, TILES, DENSE)
    shift_invariant = True
    unweighted = True
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="first_call",
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
        window: Positive = 256,
        dilation: Positive | Sequence[Positive] = 1,
        global_projections: Annotated[str, OneOf("separate", "shared")] = "separate",
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(kernel=kernel, **shared)
        steps = [dilation] * self.heads if isinstance(dilation, int) else list(dilation)
        if len(steps) != self.heads:
            raise ValueError(f"dilation must be one number or one for each of {self.heads} heads, got {len(steps)}")
        self.window, self.global_projections = window, global_projections
        if global_projections == "separate":
            self.add_global_projections()
        # heads that share a dilation share the mask
        common = steps[:1] if len(set(steps)) == 1 else steps
        self._reach, self._strides = window * max(steps), tuple(common)
        self.contiguous = max(steps) == 1

    @property
    def reach(self) -> int:
        return self._reach

    @property
    def strides(self) -> Sequence[int]:
        return self._strides

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B #H L S"]:
        gap = (queries.position[:, :, None] - keys.position[:, None, :])[:, None]
        step: int | Tensor = self._strides[0]
        if len(self._strides) > 1:  # by head
            step = constant(self._strides, like=gap, dtype=torch.long, axes=3)
        seen = gap.abs() <= self.window * step
        return hide(seen if self.contiguous else seen & (gap % step == 0))
