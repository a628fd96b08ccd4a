"""Learned positions: one vector for each position up to `max_length`. Gehring et al. 2017, §3.1."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class Learned(nn.Module):
    """Position -> vector from a table of unit variance, scaled like token embeddings: stored small, read times √E.

    Args:
        dim: model width E.
        max_length: number of positions; a later one is refused.
    """

    def __init__(self, *, dim: int, max_length: int):
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.table = nn.Embedding(max_length, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)

    def forward(self, position: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
        check_end("learned", position, self.max_length)
        return self.table(position) * self.dim**0.5


def check_end(scheme: str, position: Tensor, max_length: int) -> None:
    """Raise a ValueError for a position that a table of `max_length` rows does not hold."""
    if position.numel() and (last := int(position.max())) >= max_length:
        raise ValueError(f"positions={scheme} knows positions below max_length={max_length}, got position {last}")
