"""Groups of tokens that stand with several processes: each makes its part of a group, and who needs it adds the parts.

Keys of groups, means of levels: whatever is a sum over a group's tokens. So no group waits for its tokens to come
together, wherever the border between two processes falls. Sent is one vector for a part of a group, to those whose
queries see the group.

Letters: G groups of one process, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.placement import Placement
from attention_zoo.ops.exchange.columns import fetched
from attention_zoo.ops.exchange.route import Route


class Gathered(NamedTuple):
    """What one process gathers.

    Fields:
        route: of parts of groups.
        own: which of its own groups it needs itself.
        slots: [B, n], where parts belong, those that come before the own; `shares`, [B, n, 1], how they count: 0 is not
            there.
        groups: the whole groups, at position g of their document; rows with fewer are filled up with padding.
        tokens: [B, columns], how many tokens each has.
    """

    route: Route
    own: Int[Tensor, " n"]
    slots: Int[Tensor, "B m"]
    shares: Float[Tensor, "B m 1"]
    groups: Layout
    tokens: Int[np.ndarray, "B n"]


class Parts(NamedTuple):
    """Groups of one process's own tokens.

    Fields:
        groups: at position g of their document.
        tokens: [B, G], how many of its tokens each has.
    """

    groups: Host
    tokens: Int[np.ndarray, "B G"]


def gathering(
    placement: Placement,
    parts: Sequence[Parts],
    low: Int[np.ndarray, "B L"],
    high: Int[np.ndarray, "B L"],
    *,
    mean: bool = False,
) -> Gathered:
    """Who needs which groups.

    Args:
        parts: of each process.
        low, high: for each token of the whole sequence the numbers g of groups of its document that it sees, from `low`
            up to `high`, without it; neither falls along a document. Several ranges: one after the other along the
            first axis, [ranges · B, L].
        mean: whether parts are means of their tokens, of which the mean of all is made; else sums.
    """
    me, size, device = placement.rank, placement.size, placement.whole.valid.device

    def wants(reader: int, source: int) -> Bool[np.ndarray, "B G"]:
        return _within(placement.whole.host, placement.columns[reader], low, high, parts[source].groups)

    sends = [np.flatnonzero(wants(reader, me).any(0) & (reader != me)) for reader in range(size)]
    order = [*(source for source in range(size) if source != me), me]
    mine = {source: wants(me, source) for source in order}
    columns = {source: np.flatnonzero(seen.any(0)) for source, seen in mine.items()}
    route = Route(
        placement,
        tuple(tensor_of(each, device) for each in sends),
        tuple(len(columns[source]) if source != me else 0 for source in range(size)),
    )
    there = np.concatenate([mine[source][:, columns[source]] for source in order], 1)
    fields = zip(*(parts[source].groups.take_all(columns[source]) for source in order), strict=True)
    host = Host(*(np.concatenate(each, 1) for each in fields))
    count = np.concatenate([parts[source].tokens[:, columns[source]] for source in order], 1) * there
    slots, groups, tokens = _joined(host, there, count)
    share = count / np.take_along_axis(tokens, slots, 1).clip(min=1) if mean and tokens.size else there * 1.0
    return Gathered(
        route,
        tensor_of(columns[me], device),
        tensor_of(slots, device),
        tensor_of(share[..., None], device),
        Layout.known(groups, device),
        tokens,
    )


def gathered(x: Float[Tensor, "B G E"], plan: Gathered, kind: str) -> Float[Tensor, "B n E"]:
    """The groups that this process needs, of its own parts and those of others.

    Args:
        x: of its own groups.
        kind: under which the bytes are counted.
    """
    parts = torch.cat([fetched(x, plan.route, kind), x.index_select(1, plan.own)], 1) * plan.shares.to(x.dtype)
    row = torch.arange(len(x), device=x.device)[:, None]
    # in a fixed order everywhere, which adding by `scatter_add` has not
    return x.new_zeros(len(x), plan.groups.valid.shape[1], x.shape[2]).index_put(
        (row, plan.slots), parts, accumulate=True
    )


def _within(host: Host, columns: Array, low: Array, high: Array, groups: Host) -> Bool[np.ndarray, "B G"]:
    """Which of these groups some of these tokens see."""
    B = len(host.valid)
    found = np.zeros(groups.valid.shape, bool)
    for number in range(len(low)):
        row = number % B
        mine = columns[host.valid[row, columns]]
        if not len(mine) or not groups.valid.shape[1]:
            continue
        known = np.unique(host.document[row, mine])
        stride = int(max(high[number, mine].max(), groups.position[row].max())) + 1
        base = np.searchsorted(known, host.document[row, mine]) * stride
        lows, highs = base + low[number, mine].clip(min=0), base + high[number, mine].clip(0, stride)
        at = np.searchsorted(known, groups.document[row]).clip(max=len(known) - 1)
        code = at * stride + groups.position[row]
        # ranges never fall along a row: of those that begin early enough the last one reaches farthest
        last = np.searchsorted(lows, code, side="right") - 1
        seen = (last >= 0) & (highs[last.clip(min=0)] > code) & (known[at] == groups.document[row])
        found[row] |= seen & groups.valid[row]
    return found


def _joined(host: Host, there: Array, count: Array) -> tuple[Array, Host, Int[np.ndarray, "B n"]]:
    """Slots of all parts, the groups that these are of, and how many tokens those have."""
    B = len(there)
    slots, firsts = np.zeros(there.shape, np.int64), []
    for row in range(B):
        at = np.flatnonzero(there[row])
        pairs = np.stack([host.document[row, at], host.position[row, at]])
        _, first, slot = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
        slots[row, at] = slot.reshape(-1)
        firsts.append(at[first])
    columns = max(map(len, firsts), default=0)
    held, valid = np.zeros((B, columns), np.int64), np.zeros((B, columns), bool)
    for row, each in enumerate(firsts):
        held[row, : len(each)], valid[row, : len(each)] = each, True
    tokens = np.zeros((B, columns), np.int64)
    if columns:
        np.add.at(tokens, (np.arange(B)[:, None], slots), count)
    groups = host.take(held) if columns else host.cut(slice(0, 0))
    return slots, groups._replace(valid=valid, is_global=np.zeros_like(valid)), tokens
