"""Weighted sums of some rows of a matrix, and their gradient, in one operator each.

    y_t = Σ_e weight_e · x_{source_e}    over the entries e of target t;  zeros where it has none

Which rows go where is known on the host, once for a layout, and so is the same turned round: each sum is taken in the
order of its entries, in float32 for half precision, so that the same call gives the same bits on a GPU, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of


class Bags(NamedTuple):
    """Entries by target: those of target t are offsets[t] ... offsets[t + 1] - 1.

    Fields:
        source: the row of each entry.
        offsets: one more than there are targets.
        weight: of each entry, in the dtype of what is summed; None: all are 1.
    """

    source: Int[Tensor, " e"]
    offsets: Int[Tensor, " n"]
    weight: Float[Tensor, " e"] | None

    def sums(self, x: Float[Tensor, "m F"]) -> Float[Tensor, "t F"]:
        found: Tensor = torch.nn.functional.embedding_bag(
            self.source, x, self.offsets, mode="sum", per_sample_weights=self.weight, include_last_offset=True
        )
        return found


def bags_both_ways(
    target: Int[np.ndarray, " e"],
    source: Int[np.ndarray, " e"],
    weight: Float[np.ndarray, " e"] | None,
    *,
    targets: int,
    sources: int,
    like: Tensor,
) -> tuple[Bags, Bags]:
    """From sources to targets, and back: entries in any order.

    Args:
        like: of the dtype and on the device of what will be summed.
    """
    return _bags(target, source, weight, targets, like), _bags(source, target, weight, sources, like)


def _bags(target: Array, source: Array, weight: Array | None, targets: int, like: Tensor) -> Bags:
    order, device = np.argsort(target, kind="stable"), like.device
    offsets = np.concatenate([[0], np.bincount(target, minlength=targets).cumsum()])
    factors = None if weight is None else tensor_of(weight[order], device).to(like.dtype)
    return Bags(tensor_of(source[order].astype(np.int64), device), tensor_of(offsets.astype(np.int64), device), factors)
