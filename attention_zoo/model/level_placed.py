"""A level of a shortened causal stack over a sequence that several processes own.

A group lives where the token lives that opens it, its last one; so a process makes its groups of its own tokens and of
the k - 1 before them, and its tokens read groups of its own and the `reach` before. These few travel; what is inside
runs on the groups as on any sequence of which each process has some columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Output, add_losses, weighed
from attention_zoo.layout.halo import Halo, halo
from attention_zoo.layout.host import Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import gathered
from attention_zoo.layout.placement import Placement
from attention_zoo.layout.windows import windows
from attention_zoo.model.placed import alone, called
from attention_zoo.ops.exchange.halo import behind_halo


def output_in_place(level: Any, x: Float[Tensor, "B L E"], layout: Layout) -> Output:
    """A call of a causal `Level` on a shard."""
    nothing: dict[str, Any] = {"state": None, "source": None, "choices": None}
    tokens = alone(layout)
    at = windows(tokens, level.size, causal=True, reach=level.reach)
    first = called(level.before, x, layout, **nothing)
    lead = level.size - 1
    beside = halo(layout, ("tokens before", lead), lambda position: position - lead, last=lead)
    held, hidden = _beside(behind_halo(first.hidden, layout, beside, "tokens before"), beside, layout, lead)
    groups = level.pool(hidden, held, at)
    count = groups.shape[1]
    inner = layout.plan(("groups", level.size, level.reach), lambda: _inner(level, layout.placement)).own
    if not count:  # a column of padding, for everybody takes part
        groups = hidden[:, :1] * 0
    middle = called(level.inside, groups, inner, **nothing)
    key = "groups before", level.reach
    beside = halo(inner, key, lambda position: position, last=level.reach, asked=layout.placement)
    latest, made = _beside(behind_halo(middle.hidden, inner, beside, "groups before"), beside, inner, level.reach)
    wide = level.up(hidden, made[:, :count], latest, at)
    last = called(level.after, wide, layout, **nothing)
    share = inner.placement.whole.read / max(1, layout.placement.whole.read)
    inside = weighed(middle.losses, level.inside, share)
    return Output(last.hidden, None, add_losses(first.losses, inside, last.losses))


def _inner(level: Any, placement: Placement) -> Placement:
    """Where groups live: those of each process side by side, so that rows of different lengths have holes."""
    parts = []
    for columns in placement.columns:
        tokens = Placement.chosen(placement.whole, columns)
        host = windows(tokens, level.size, causal=True, reach=level.reach).groups.host
        parts.append(host if host.valid.shape[1] else padding(len(host.valid)))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.then(part)
    borders = np.cumsum([0, *(part.valid.shape[1] for part in parts)])
    owned = tuple(np.arange(a, b) for a, b in pairwise(borders))
    made = Layout.known(whole, placement.whole.valid.device)
    return Placement(placement.group, placement.rank, placement.size, made, owned, placement.traffic)


def padding(rows: int) -> Host:
    """One column of each row, which is none."""
    return Host.plain(rows, 1)._replace(valid=np.zeros((rows, 1), bool))


def _beside(
    x: Float[Tensor, "B n_and_L E"], beside: Halo, layout: Layout, count: int
) -> tuple[Float[Tensor, "B count E"] | None, Float[Tensor, "B L E"]]:
    """The halo, pushed to the right: the last `count` before the own columns, zeros where there are fewer; and those.

    Own columns go on from here, so that whoever sends some hears of their gradients, also who fetches none.
    """
    own = x[:, beside.width :]
    if not beside.width:
        return None, own

    def find() -> Any:
        there = beside.keys.host.valid[:, : beside.width]
        # a stable order: what is not there first, then what is, as it stands
        order = np.argsort(there, axis=1, kind="stable")
        columns = np.pad(order, ((0, 0), (max(0, count - beside.width), 0)))[:, -count:]
        held = np.pad(np.take_along_axis(there, order, 1), ((0, 0), (max(0, count - beside.width), 0)))[:, -count:]
        return tensor_of(columns, x.device), tensor_of(~held[..., None], x.device), beside

    columns, missing, _ = layout.plan(("pushed to the right", id(beside), count, x.device), find)
    return gathered(x, columns).masked_fill(missing, 0), own
