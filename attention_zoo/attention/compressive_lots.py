"""Pieces of a compressed memory as sequences of a Triton kernel, found on the host for all layers that divide alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attention_zoo.attention.compressive_plans import Sized, Sizes, sized
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.relative.gathered import NUMBERS, PROGRAMS, Lot, LotPlan


def lots_of(keys: Layout, slots: Layout, queries: int, sizes: Sizes, *, heads: int, head_width: int) -> LotPlan | str:
    """The last `queries` columns of the keys as queries; what they see stands in a table of the slots, then the keys.

    Made once for the same of all. Or why the kernel does not take them.
    """
    key = ("lots", id(slots), queries, sizes, heads, head_width)
    return keys.plan(key, lambda: (_lots(keys, slots, queries, sizes, heads, head_width), slots))[0]


def _lots(keys: Layout, slots: Layout, queries: int, sizes: Sizes, heads: int, head_width: int) -> LotPlan | str:
    host, device = keys.host, keys.valid.device
    asked = host.valid[:, host.valid.shape[1] - queries :]
    table = host.valid.shape[1] + slots.host.valid.shape[1]
    found = list(sized(keys, slots, queries, sizes, together=True))
    for each in found:
        W = each.columns.shape[1]
        if bool(((each.columns < 0) & (np.arange(W) >= W - each.seen)).any()):
            return "a token sees positions that are not there"
    lots = [
        _lot(part, queries, asked.size, table, len(asked) * table, device)
        for each in found
        for part in _parts(each, heads, head_width)
    ]
    return LotPlan(tuple(lots), max((int(each.seen.max()) for each in found), default=1), bool(asked.all()))


def _parts(pieces: Sized, heads: int, head_width: int) -> Iterator[Sized]:
    """As many at once as may be gathered."""
    n, W = pieces.columns.shape
    most = max(1, min(NUMBERS // (W * heads * head_width), PROGRAMS // heads))
    for start in range(0, n, most):
        yield Sized(*(field[start : start + most] for field in pieces))


def _lot(pieces: Sized, queries: int, every: int, table: int, all_keys: int, device: torch.device) -> Lot:
    from attention_zoo.ops.relative.triton import Starts

    row, asked, columns, seen, own = pieces
    (_, R), (_, W) = asked.shape, columns.shape
    here, there = asked >= 0, columns >= 0
    # who is not there reads what the last one does, so that nobody else's numbers come in
    rows = np.where(here, asked, asked[:, -1:]) + row * queries
    places = np.where(here, rows, every)
    found = np.where(there, columns, columns[:, -1:]) + row * table
    column = np.arange(W - R, W)
    first, inside = (np.where(here, W - count, column + 1) for count in (seen, own))
    most = int(own.max())
    mine = np.arange(W)[None, W - most :] >= W - own
    return Lot(
        tensor_of(rows, device),
        tensor_of(places, device),
        tensor_of(found, device),
        Starts(tensor_of(first, device), tensor_of(inside, device), W),
        most,
        tensor_of(np.where(mine, found[:, W - most :], all_keys), device),
    )
