"""Full attention: torch's fused kernel, and the matrix materialised by plain operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention_zoo.contract import Attention
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Adapter


class Fused(Adapter):
    """torch's scaled_dot_product_attention, two-sided or causal as ours."""

    title = "SDPA"
    fair = "Every pair (causal: every earlier one) is attended to, where ours sees its pattern alone: a baseline."

    def __init__(self, layer: Attention, shape: Shape):
        super().__init__(layer, shape)
        self.causal = layer.causal

    def enter(self, x: Tensor) -> Tensor:
        return x

    def call(self, *operands: Tensor) -> Tensor:
        q, k, v = operands
        return scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def leave(self, out: Tensor) -> Tensor:
        return out


class Materialised(Fused):
    """softmax(QKᵀ + mask) V with all scores in memory, as models wrote it before fused kernels."""

    title = "materialised"
    fair = "As SDPA, but scores and weights are stored: L x L."

    def __init__(self, layer: Attention, shape: Shape):
        super().__init__(layer, shape)
        self.scale = self.width**-0.5
        self.hidden = None
        if self.causal:
            ones = torch.ones(self.length, self.length, dtype=torch.bool, device=shape.device)
            self.hidden = ones.triu(1)

    def call(self, *operands: Tensor) -> Tensor:
        q, k, v = operands
        scores = (q * self.scale) @ k.transpose(-1, -2)
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, -torch.inf)
        return scores.softmax(-1) @ v
