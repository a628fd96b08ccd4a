"""What makes one compressed state of a group of states, and what its loss is computed from. Rae et al. 2019, §3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.attention.compressive_plans import Picked
from attention_zoo.ops.softmax.tiles import scores_at_once

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


def used_most(
    q: Float[Tensor, "B N H D"], k: Float[Tensor, "B N H D"], evicted: Sequence[Picked], new: int, *, scale: float
) -> Int[Tensor, "B new"]:
    """The columns of the states that are kept of those that leave memory: whom the segment that evicts attends to."""
    kept = torch.zeros(len(q), new, dtype=torch.long, device=q.device)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    for many in evicted:
        # a few segments at a time: of all that evict there are as many scores as tokens times a segment
        size = max(1, scores_at_once(q) // (q.shape[2] * many.queries.shape[1] * many.tokens.shape[1]))
        for each in many.split(size):
            asked = q[each.row, each.queries].transpose(1, 2)
            keys = k[each.row, each.tokens].permute(0, 2, 3, 1).flatten(0, 1)
            scores = torch.baddbmm(q.new_empty(()), asked.flatten(0, 1), keys, beta=0, alpha=scale)
            weights = scores.unflatten(0, asked.shape[:2]).softmax(-1, exact)
            if each.hidden is not None:
                weights = weights.masked_fill(each.hidden, 0)
            best = weights.sum((1, 2)).topk(each.slots.shape[1]).indices.sort().values
            kept[each.row, each.slots] = each.tokens.gather(1, best)
    return kept
