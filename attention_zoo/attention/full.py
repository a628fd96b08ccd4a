"""Full attention: every token sees every token. Vaswani et al. 2017, "Attention Is All You Need", §3.2.

    out_i = sum_j softmax_j(scale · q_i·k_j) v_j,    scale = D^-0.5;    causal: j up to i alone

O(L²) compute; memory O(L²) with `kernel=dense` (materialised) and O(L) with the fused default.

Paper: H heads of width E / H, projections without bias; what a token must not see is set to -inf before the softmax.

Released code (tensor2tensor): adds -1e9 instead of -inf, so that a row that sees nothing averages over everything, and
drops out attention weights, of which the paper does not speak. gpt-oss (OpenAI 2025; the same in transformers) learns
for each head a score b beside those of the keys, softmax over [s; b], and drops its column: `sink_logit`.

Here: -inf, and a row that sees nothing yields zeros. Projections have a bias unless `bias=False`: that is what torch
and the pretrained models have. Dropout acts on outputs, not on weights, which the fused kernels never hold. `kv_heads`
groups heads (Ainslie et al. 2023): consecutive query heads share one key and value head.

Checked: against torch.nn.MultiheadAttention, two-sided, causal and across, and as part of the skeleton against
torch.nn.TransformerEncoder and -Decoder (tests/oracles/torch_modules.py). Largest error of outputs and gradients 6e-7
in float32 and 1e-15 in float64 (tests/oracles/README.md). `sink_logit` against transformers' gpt_oss, outputs and
gradients, to 1e-12 in float64 (tests/test_sink_logit.py). Every kernel against `kernel=dense`, by the contract suite.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Abilities, Tokens
from attention_zoo.layout.reach import Anywhere


class Full(PatternAttention):
    """The baseline, twice: `kernel=sdpa` is torch's fused attention, `kernel=dense` keeps the L x L matrix.

    Args:
        sink_logit: learn for each head the score b of one more key, whose value is zero, so that it may look at nothing
            (gpt-oss): the output is multiplied by sigmoid(log-sum-exp of the scores - b). At first 0.
        kernel: auto | row | sdpa | flex | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "full"
    reach = Anywhere(weights="uniform")
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

    def __init__(self, *, sink_logit: bool = False, kernel: str = "auto", **shared: Any):
        super().__init__(sink_logit=sink_logit, kernel=kernel, **shared)

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "1 1 L S"]:
        shape = 1, 1, queries.position.shape[1], keys.position.shape[1]
        return torch.zeros(shape, dtype=torch.float32, device=queries.position.device)
