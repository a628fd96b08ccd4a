"""Few queries meet the hidden states themselves: q · (W h) = (Wᵀ q) · h, and W mixes values after the sum.

For decoding: E per pair and head where the others spend D, but no key is projected. Without gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout


class Few(NamedTuple):
    """What a few queries, the last columns of the keys, see.

    Fields:
        hidden: [B, 1, L, S], which pairs are not seen; all-seen where None.
        distance: [B, 1, L, S], how far apart pairs are; 0 where hidden.
        distances: how many there are, from 0 on.
    """

    hidden: Bool[Tensor, "B 1 L S"] | None
    distance: Int[Tensor, "B 1 L S"]
    distances: int


def few_of(keys: Layout, first: Int[np.ndarray, "B L"]) -> Few:
    """The queries see the valid keys from column `first` to their own."""
    host, L = keys.host, first.shape[1]
    column = np.arange(host.valid.shape[1])
    seen = (column >= first[..., None]) & (column <= column[-L:, None]) & host.valid[:, None]
    distance = np.where(seen, host.position[:, -L:, None] - host.position[:, None], 0)
    device = keys.valid.device
    hidden = None if bool(seen.all()) else tensor_of(~seen[:, None], device)
    return Few(hidden, tensor_of(distance[:, None], device), int(distance.max()) + 1)


def absorbed(
    q: Float[Tensor, "B H L D"],
    states: Float[Tensor, "B S E"],
    projections: tuple[nn.Linear, nn.Linear, nn.Linear],
    biases: tuple[Float[Tensor, "H D"], Float[Tensor, "H D"]],
    waves: Float[Tensor, "n E"],
    few: Few,
    *,
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """What the queries see of the hidden states; zeros where it is nothing.

    Args:
        projections: of keys, of distances and of values, whose matrices are multiplied by.
        biases: added to the queries before they meet keys and distances (the paper's u and v).
        waves: of the distances 0, 1, ...: few.distances of them.
    """
    exact, (B, H, L, D) = q.dtype, q.shape
    to_k, to_r, to_v = (layer.weight.to(exact).view(H, D, -1) for layer in projections)
    states = states.to(exact)
    # one product each, a matrix serving all rows and hidden states all heads: broadcast, they would be copied for each
    by_head = q.transpose(0, 1)
    to_keys, to_distances = (
        torch.bmm((by_head + bias[:, None, None]).reshape(H, B * L, D), weight)
        for bias, weight in zip(biases, (to_k, to_r))
    )
    # the bias of keys adds the same to all scores of a query: softmax does not see it
    content = torch.bmm(_rows(to_keys, B), states.transpose(1, 2)).view(B, H, L, -1)
    place = (to_distances.flatten(0, 1) @ waves.to(exact).T).view(H, B, L, -1).transpose(0, 1)
    scores = (content + place.gather(-1, few.distance.expand_as(content))) * scale
    if few.hidden is not None:
        scores = scores.masked_fill(few.hidden, -torch.inf)
    weights = scores.softmax(-1)
    if few.hidden is not None:
        weights = weights.masked_fill(few.hidden, 0)  # padding sees nothing: softmax gives NaN
    found = torch.bmm(weights.flatten(1, 2), states).view(B, H, L, -1).transpose(0, 1)
    out = torch.bmm(found.reshape(H, B * L, -1), to_v.transpose(1, 2)).view(H, B, L, D).transpose(0, 1)
    bias = projections[2].bias
    return out if bias is None else out + bias.view(H, 1, D)


def _rows(x: Float[Tensor, "H BL E"], B: int) -> Float[Tensor, "B HL E"]:
    """Each batch row with its queries of all heads."""
    H, rows, E = x.shape
    return x.view(H, B, rows // B, E).transpose(0, 1).reshape(B, -1, E)
