"""What makes one compressed state of a group of states, and what its loss is computed from. Rae et al. 2019, §3.1."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.attention.compressive_plans import Slots
from attention_zoo.layout.host import tensor_of

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


def with_frozen(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of x, from which it learns nothing; whatever stands in its place included."""
    frozen = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    made: Tensor = torch.func.functional_call(layer, frozen, (x,))
    return made


def picked(x: Float[Tensor, "B N H D"], row: Any, columns: Any) -> Float[Tensor, "n m H D"]:
    return x[tensor_of(row, x.device)[:, None], tensor_of(columns, x.device)]


def used_most(
    q: Float[Tensor, "B N H D"], k: Float[Tensor, "B N H D"], slots: Slots, *, scale: float
) -> Int[Tensor, "B new"]:
    """The columns of the states that are kept of those that leave memory: whom the segment that evicts attends to."""
    kept = torch.zeros(len(q), slots.new, dtype=torch.long, device=q.device)
    for each in slots.evicted:
        asked = picked(q, each.row, each.queries.clip(min=0))
        keys, count = picked(k, each.row, each.tokens), each.slots.shape[1]
        there = tensor_of(each.queries >= 0, q.device)
        for item, (mine, theirs) in enumerate(zip(asked, keys)):
            scores = torch.einsum("shd,thd->hst", mine, theirs) * scale
            weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))
            best = (weights * there[item, :, None]).sum((0, 1)).topk(count).indices.sort().values
            columns = tensor_of(each.tokens[item], q.device)[best]
            kept[int(each.row[item]), tensor_of(each.slots[item], q.device)] = columns
    return kept
