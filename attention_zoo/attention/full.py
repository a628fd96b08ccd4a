"""Full attention: every token sees every token. Vaswani et al. 2017, §3.2.

O(L²) compute; memory O(L²) with `kernel=dense` (materialised) and O(L) with the fused default.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.ops.dispatch import DENSE, SDPA, TILES
from attention_zoo.ops.row import ROW


class Full(PatternAttention):
    """The baseline, twice: `kernel=sdpa` is torch's fused attention, `kernel=dense` keeps the L x L matrix.

    Args:
        kernel: auto | row | sdpa | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "full"
    kernels = (ROW, SDPA, TILES, DENSE)
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="any",
        cross=True,
        compute="quadratic",
        activations="linear",
        state="linear",
        positions=("none", "rotary", "alibi"),
        grouped_heads=True,
    )

    def __init__(self, *, kernel: str = "auto", **shared: Any):
        super().__init__(kernel=kernel, **shared)

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "1 1 L S"]:
        return torch.zeros(1, 1, queries.position.shape[1], keys.position.shape[1], device=queries.position.device)
