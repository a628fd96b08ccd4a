"""A row's tokens k at a time as one token each: how a stack that is shortened by k lays its columns, and back.

    causal      group g is made of tokens g·k - k + 1 ... g·k of its document: complete with the first token that
                reads it, since token p reads group p // k. Before the document's start there is nothing.
    two-sided   group g is made of tokens g·k ... g·k + k - 1, the last of what is there.

The causal form is the shift right by k - 1 before groups of k. No group waits for later tokens, so every token has
one, of any length. What later calls need are the last k - 1 tokens and the last groups, which stand before a call's own
columns (`lead` and `past` of them); what of them is of another document is never read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout


class Windows(NamedTuple):
    """Where things are read. Columns count from 1 on: 0 is a column of zeros.

    Fields:
        groups: [B, G], the groups as tokens: at position g of their document; global if the token that opens one is.
        members: [B, G, k], columns of [0 | lead tokens before | L tokens].
        there: [B, G, k], which members there are; one at least, also at padding.
        divisor: [B, G, 1], by how many a sum is divided.
        own: [B, L], the group of each token, a column of [0 | past groups before | G groups].
        phase: [B, L], place of each token among those that read its group.
        near: [B, L, n], groups around the own one, as `own`; the own one stands first.
        seen: [B, L, n], which of them there are; the own one always.
        last: [B, lead], the tokens that stand before the next call's; columns as in `members`.
        latest: [B, past], its groups; columns as in `own`.
        plain: whether columns are positions: slices do for indices.
    """

    groups: Layout
    members: Int[Tensor, "B G k"]
    there: Bool[Tensor, "B G k"]
    divisor: Float[Tensor, "B G 1"]
    own: Int[Tensor, "B L"]
    phase: Int[Tensor, "B L"]
    near: Int[Tensor, "B L n"]
    seen: Bool[Tensor, "B L n"]
    last: Int[Tensor, "B lead"]
    latest: Int[Tensor, "B past"]
    plain: bool


def windows(layout: Layout, size: int, *, causal: bool, reach: int = 1) -> Windows:
    """Groups of `size`; the same object for the same call.

    Args:
        reach: how many groups a token reads: its own and those before, and where it is two-sided as many after.
    """
    return layout.plan(("windows", size, causal, reach), lambda: _windows(layout, size, causal, reach))


def _windows(layout: Layout, k: int, causal: bool, reach: int) -> Windows:
    host, device = layout.host, layout.valid.device
    B, L = host.valid.shape
    rows, lead, past = np.arange(B)[:, None], (k - 1) * causal, reach * causal
    opens = host.valid & (host.position % k == 0)
    group = opens.cumsum(1) - 1  # of each token, counted over the call
    G = int(group.max(initial=-1)) + 1
    order = np.argsort(~host.valid, axis=1, kind="stable")
    amount = host.valid.sum(1)[:, None]

    def column(rank: Array) -> Array:
        """Of the token that is the row's rank-th valid one; before the call's own it is negative."""
        inside = rank.clip(0, max(0, L - 1))
        return 1 + lead + np.where(rank < 0, rank, order[rows.reshape(B, *[1] * (rank.ndim - 1)), inside])

    opener = np.argsort(~opens, axis=1, kind="stable")[:, :G]
    held = opens[rows, opener]
    position, document, length = (field[rows, opener] for field in (host.position, host.document, host.length))
    rank = (host.valid.cumsum(1) - 1)[rows, opener][..., None] + np.arange(k) - lead
    if causal:
        there = position[..., None] + np.arange(k) - lead >= 0
    else:
        follows = order[rows[..., None], rank.clip(0, max(0, L - 1))]
        there = (rank < amount[..., None]) & (host.document[rows[..., None], follows] == document[..., None])
    there = there & held[..., None]
    members = np.where(there, column(rank), 0)
    divisor = np.full((B, G, 1), k) if causal else there.sum(-1, keepdims=True).clip(min=1)

    steps = -np.arange(reach) if causal else np.array(sorted(range(1 - reach, reach), key=abs))
    number = (host.position // k)[..., None] + steps
    near = group[..., None] + steps
    seen = (number >= 0) & host.valid[..., None]
    if not causal and G:
        inside = near.clip(0, G - 1)
        alike = held[rows[..., None], inside] & (document[rows[..., None], inside] == host.document[..., None])
        seen = seen & alike & (near >= 0) & (near < G)
    elif not causal:  # no token opens a group, as where all is padding
        seen = seen & False
    near = np.where(seen & (near >= -past), near + 1 + past, 0)

    def of_groups(field: Array) -> Array:
        return np.where(held, field, 0)

    made = Host(
        of_groups(position // k),
        held,
        host.is_global[rows, opener] & held,
        of_groups(document),
        of_groups(-(-length // k)),
    )
    plain = layout.dense and layout.starts_at_zero and L > 0
    groups = Layout.plain(B, G, device) if plain and layout.implied else Layout.known(made, device)

    def on_device(array: Array) -> Tensor:
        return tensor_of(np.ascontiguousarray(array), device)

    rest = np.arange(lead)
    return Windows(
        groups,
        members=on_device(members),
        there=on_device(there | ~held[..., None]),
        divisor=on_device(divisor.astype(np.float32)),
        own=on_device(near[..., 0]),
        phase=on_device(host.position % k),
        near=on_device(near),
        seen=on_device(seen | (steps == 0)),
        last=on_device(column(amount - lead + rest)),
        latest=on_device(2 + group[:, -1:] + np.arange(past)),
        plain=plain,
    )
