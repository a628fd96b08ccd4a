"""Axial positions: a long learned table as the product of two short ones. Kitaev et al. 2020, released code.

Position p lies in row p // columns and column p % columns of a grid of about √max_length a side; half of the channels
come from the row's vector and half from the column's. O(√max_length · E) parameters instead of O(max_length · E).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.positions.learned import check_end


class Axial(nn.Module):
    """Position -> vector; scaled like `Learned`.

    Args:
        dim: model width E.
        max_length: number of positions; a later one is refused.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, dim: int, max_length: int):
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.columns = math.isqrt(max_length - 1) + 1
        self.row = nn.Embedding(-(-max_length // self.columns), dim // 2)
        self.column = nn.Embedding(self.columns, dim - dim // 2)
        for table in (self.row, self.column):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, position: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
        check_end("axial", position, self.max_length)
        row, column = self.row(position // self.columns), self.column(position % self.columns)
        return torch.cat([row, column], -1) * self.dim**0.5
