"""Learned positions: one vector for each position up to `max_length`. Gehring et al. 2017, §3.1."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.options import Factor, Natural, Positive, checked


class Learned(nn.Module):
    """Position -> vector from a table of unit variance, scaled like token embeddings: stored small, read times √E.

    Args:
        dim: model width E.
        max_length: number of positions; a later one is refused.
        scale: factor on what is read; default √E.
        uncounted: id of a token that takes no position (RoBERTa: its padding). Such a token stands at position -1,
            whose vector is `nowhere`; the skeleton numbers the others.
    """

    options = ("scale", "uncounted")

    @checked(prefix="positions.")
    def __init__(
        self, *, dim: Positive, max_length: Positive, scale: Factor | None = None, uncounted: Natural | None = None
    ):
        super().__init__()
        self.dim, self.max_length, self.uncounted = dim, max_length, uncounted
        self.scale = dim**0.5 if scale is None else scale
        self.table = nn.Embedding(max_length, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.nowhere = None if uncounted is None else nn.Parameter(torch.zeros(dim))

    def forward(self, position: Int[Tensor, "B L"], *, last: int | None = None) -> Float[Tensor, "B L E"]:
        """In the table's own dtype. `last`: the largest position, where it is known already."""
        check_end("learned", position, self.max_length, last)
        if self.nowhere is None:
            return self.table(position) * self.scale
        found = torch.where(position[..., None] < 0, self.nowhere, self.table(position.clamp(min=0)))
        return found * self.scale


def check_end(scheme: str, position: Tensor, max_length: int, last: int | None = None) -> None:
    """Raise a ValueError for a position that a table of `max_length` rows does not hold.

    Args:
        last: the largest; None: it is read, which makes the call wait for the device.
    """
    last = (int(position.max()) if position.numel() else 0) if last is None else last
    if last >= max_length:
        raise ValueError(f"positions={scheme} knows positions below max_length={max_length}, got position {last}")
