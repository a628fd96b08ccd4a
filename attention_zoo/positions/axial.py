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

from attention_zoo.options import Factor, Natural, Positive, checked
from attention_zoo.positions.learned import check_end


class Axial(nn.Module):
    """Position -> vector; scaled like `Learned`.

    Args:
        dim: model width E.
        max_length: number of positions; a later one is refused.
        columns: of the grid; default √max_length.
        row_width: channels that come from the row's vector; default E/2.
        scale: factor on what is read; default √E.
    """

    options: ClassVar[tuple[str, ...]] = ("columns", "row_width", "scale")

    @checked(prefix="positions.")
    def __init__(
        self,
        *,
        dim: Positive,
        max_length: Positive,
        columns: Positive | None = None,
        row_width: Natural | None = None,
        scale: Factor | None = None,
    ):
        super().__init__()
        self.max_length, self.scale = max_length, dim**0.5 if scale is None else scale
        self.columns = math.isqrt(max_length - 1) + 1 if columns is None else columns
        row_width = dim // 2 if row_width is None else row_width
        if not 0 <= row_width <= dim:
            raise ValueError(f"positions.row_width must be between 0 and dim={dim}, got {row_width}")
        self.row = nn.Embedding(-(-max_length // self.columns), row_width)
        self.column = nn.Embedding(self.columns, dim - row_width)
        for table in (self.row, self.column):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, position: Int[Tensor, "B L"], *, last: int | None = None) -> Float[Tensor, "B L E"]:
        """In the table's own dtype. `last`: the largest position, where it is known already."""
        check_end("axial", position, self.max_length, last)
        row, column = self.row(position // self.columns), self.column(position % self.columns)
        return torch.cat([row, column], -1) * self.scale
