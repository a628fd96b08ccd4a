"""Local layers beside memory-compressed ones: attention within blocks. Liu et al. 2018, §4.2.4 ("local attention").

A document is cut into blocks of `block` tokens; a token sees its own block, up to itself where causal. O(L · block).
A companion of `memory_compressed`, with which the paper's stacks alternate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.host import Array
from attention_zoo.layout.reach import Reach, Tiles
from attention_zoo.options import Positive


class LocalBlocks(PatternAttention):
    """Attention to the own block.

    Args:
        block: tokens of a block.
        kernel: auto | row | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "memory_compressed.local"
    tiny = {"block": 4}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="first_call",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        grouped_heads=True,
    )

    def __init__(self, *, block: Positive = 256, kernel: str = "auto", **shared: Any):
        super().__init__(kernel=kernel, **shared)
        self.block = block
        self.reach = OwnBlock(block, weights="counts")

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B 1 L S"]:
        mine, theirs = (tokens.position // self.block for tokens in (queries, keys))
        return hide((mine[:, :, None] == theirs[:, None, :])[:, None])


@dataclass(frozen=True)
class OwnBlock(Reach):
    """Keys of the query's own block of `size` tokens."""

    size: int
    weights: Any = "any"

    @property
    def farthest(self) -> int:
        return self.size - 1

    def near(self, tiles: Tiles) -> Array:
        first, last, low, high = (x // self.size for x in (tiles.q_lo, tiles.q_hi, tiles.k_lo, tiles.k_hi))
        return (low <= last) & (first <= high)
