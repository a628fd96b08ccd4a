"""What makes one compressed state of a group of states. Rae et al. 2019, §3.1."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

LEARNED = {"conv": 1, "dilated": 2}
"""Functions with weights, and how many tokens apart their taps stand."""


class Compression(nn.Module):
    """[B, G, t, E] of tokens -> [B, G, E].

    Args:
        function: mean | max | conv | dilated. A convolution has as many taps as a group has tokens; "dilated" reads
            every other token, so that half of what it sees lies in the group before.
        dim: E.
        ratio: tokens of a group, t.
    """

    def __init__(self, function: str, dim: int, ratio: int):
        super().__init__()
        self.function = function
        if function in LEARNED:
            self.conv = nn.Conv1d(dim, dim, ratio, stride=ratio, dilation=LEARNED[function])

    def forward(self, x: Float[Tensor, "B G t E"], missing: Bool[Tensor, "B G t"] | None) -> Float[Tensor, "B G E"]:
        if self.function == "mean":
            return x.mean(2)
        if self.function == "max":
            return x.amax(2)
        if missing is not None:
            x = x.masked_fill(missing[..., None], 0)  # before the document there is nothing
        weight = self.conv.weight.transpose(1, 2).flatten(1)
        return nn.functional.linear(x.flatten(2), weight, self.conv.bias)

    def frozen(self) -> bool:
        """Whether nothing is to be learned."""
        return not any(parameter.requires_grad for parameter in self.parameters()) or not torch.is_grad_enabled()
