"""A window and the first few tokens of a document, which all later ones see. Xiao et al. 2024, §3. O(L · window)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.reach import Band
from attention_zoo.options import Positive


class Anchors(PatternAttention):
    """Attention to the last tokens and to the very first.

    Args:
        window: tokens before a token that it sees, and after it where both sides are seen.
        sinks: first tokens of each document that every token sees.
    """

    name = "anchors"
    tiny = {"window": 4, "sinks": 2}
    declared = Abilities(
        causality="strict", carry="prefix", two_sided=True, global_tokens="first_call", cross=False,
        compute="linear", activations="linear", state="constant", positions=("none", "rotary"),
    )  # fmt: skip

    def __init__(self, *, window: Positive = 256, sinks: Positive = 4, **shared: Any):
        super().__init__(**shared)
        self.window, self.sinks = window, sinks
        self.reach = Band(window, first=sinks, weights="uniform")

    def bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        mine, theirs = queries.position[:, None, :, None], keys.position[:, None, None, :]
        return hide(((mine - theirs).abs() <= self.window) | (theirs < self.sinks))
