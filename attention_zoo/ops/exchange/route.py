"""Who sends which columns to whom: a plan that every process makes for itself, from what is known to all.

A route is made of entries, rows of a tensor [B, n, E]. What comes stands in the order of its senders.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.placement import Placement


class Route(NamedTuple):
    """What one process sends and what comes to it.

    Fields:
        placement: of whose columns.
        sends: for each process which of this one's entries it is sent; none for this one itself.
        receives: how many entries come from each process.
    """

    placement: Placement
    sends: tuple[Int[Tensor, " n"], ...]
    receives: tuple[int, ...]

    @property
    def sent(self) -> int:
        """Entries that leave this process."""
        return sum(map(len, self.sends))

    @property
    def received(self) -> int:
        """Entries that come to it."""
        return sum(self.receives)


class Fetch(NamedTuple):
    """Columns of others that this process needs.

    Fields:
        route: its entries are columns; or, where heads need different ones, those of key head after key head.
        columns: which columns of the whole sequence come, in the order in which they do; of any head.
        into: [K, n], where each entry that comes belongs, counted over [K, len(columns)]; None: heads need the same.
    """

    route: Route
    columns: Int[np.ndarray, " n"]
    into: Int[Tensor, " n"] | None = None


def fetching(placement: Placement, wanted: Sequence[Bool[np.ndarray, "#K L"]], device: torch.device) -> Fetch:
    """The route by which every process gets the columns that it wants from their owners.

    Args:
        wanted: for each process, of each key head or of all alike. Its own among them do not travel.
    """
    me, columns = placement.rank, placement.columns
    nothing = np.zeros(0, np.int64)

    def entries(by: int, owner: int) -> Array:
        """Which of the owner's entries another process wants."""
        if by == owner:
            return nothing
        return np.flatnonzero(wanted[by][:, columns[owner]])

    sends = tuple(tensor_of(entries(rank, me), device) for rank in range(placement.size))
    coming = [entries(me, rank) for rank in range(placement.size)]
    route = Route(placement, sends, tuple(map(len, coming)))
    if len(wanted[me]) == 1:
        return Fetch(route, np.concatenate([columns[rank][each] for rank, each in enumerate(coming)]))
    somebody = [np.flatnonzero(wanted[me][:, each].any(0) & (rank != me)) for rank, each in enumerate(columns)]
    held = np.concatenate([columns[rank][each] for rank, each in enumerate(somebody)])
    into, start = [], 0
    for rank, each in enumerate(coming):
        head, column = np.divmod(each, max(1, len(columns[rank])))
        into.append(head * len(held) + start + np.searchsorted(somebody[rank], column))
        start += len(somebody[rank])
    return Fetch(route, held, tensor_of(np.concatenate(into), device))


def back_again(fetch: Fetch) -> Route:
    """The route by which what was made of fetched columns goes to their owners: it comes in the order of `sends`."""
    route = fetch.route
    borders = np.cumsum([0, *route.receives])
    device = route.sends[0].device
    sends = tuple(torch.arange(a, b, device=device) for a, b in pairwise(borders))
    return Route(route.placement, sends, tuple(map(len, route.sends)))
