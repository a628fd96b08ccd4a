"""Hidden states behind those of the columns before them, fetched from whoever owns these."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.layout.halo import Halo
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.exchange.columns import fetched
from attention_zoo.ops.exchange.route import Fetch, fetching


def behind_halo(
    x: Float[Tensor, "B L E"], layout: Layout, halo: Halo, kind: str, *, learns: bool = True
) -> Float[Tensor, "B n_and_L E"]:
    """x, with the halo in front: the vectors of `halo.keys`.

    Go on with the own columns of what is returned: a process that fetches none hears of gradients through them alone.

    Args:
        layout: of the own columns, with their placement.
        kind: under which the bytes are counted.
        learns: whether gradients travel back. All processes must say the same.
    """
    if not any(map(len, halo.needs)):
        return x
    found = route_of(layout, halo, x.device)
    return torch.cat([fetched(x if learns else x.detach(), found.route, kind), x], 1)


def route_of(layout: Layout, halo: Halo, device: torch.device) -> Fetch:
    """How a halo's columns come; one object for each.

    Args:
        layout: of the own columns, with their placement.
    """

    def route() -> tuple[Fetch, Halo]:
        placement, length = layout.placement, layout.placement.whole.valid.shape[1]
        wanted = [np.zeros((1, length), bool) for _ in halo.needs]
        for mask, columns in zip(wanted, halo.needs):
            mask[0, columns] = True
        found = fetching(placement, wanted, device)
        assert np.array_equal(found.columns, halo.needs[placement.rank]), "columns lie in the order of processes"
        return found, halo

    # the plan keeps what the key's id is of
    return layout.plan(("halo's route", id(halo), device), route)[0]
