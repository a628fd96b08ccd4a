"""Groups of tokens as tokens: what compressed memories, strided keys, summaries and shorter stacks work on.

A group is k tokens of one document whose positions are g·k ... g·k + k - 1, all of them there: padding, holes and
borders of documents fall into none, and what is not complete yet waits (`Pooled.waiting`) for later tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.rules import at_least
from attention_zoo.tokens import Tokens


class Pooled(NamedTuple):
    """The complete groups of a layout's tokens, G columns; rows with fewer are filled up with padding at the end.

    Fields:
        groups: the groups as tokens of their own: at position g of their document, which is shorter by k. Documents
            keep their numbers; a group is global if one of its tokens is.
        ends: the same groups at the positions of their last tokens. So they stand among the tokens: a causal query
            sees a group only once it is complete.
        members: [B, G, k], the columns of each group's tokens; any at padding.
        waiting: [B, L], tokens of the last group of a row's last document, where that is not complete yet.
    """

    groups: Layout
    ends: Layout
    members: Int[Tensor, "B G k"]
    waiting: Bool[np.ndarray, "B L"]

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] of tokens -> [B, G, k, ...] of the groups' members."""
        B, G, k = self.members.shape
        index = self.members.reshape(B, G * k, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index).unflatten(1, (G, k))


def pooled(tokens: Tokens, size: int) -> Pooled:
    """Groups of `size` tokens; of a `Layout`, the same object for the same size."""
    at_least(1, size=size)
    layout = Layout.of(tokens)
    return layout.plan(("pooled", size), lambda: _pooled(layout, size))


def _pooled(layout: Layout, size: int) -> Pooled:
    host, device = layout.host, layout.valid.device
    B, L = host.valid.shape
    found: list[list[np.ndarray]] = []
    waiting = np.zeros((B, L), bool)
    for row in range(B):
        columns = host.valid[row].nonzero()[0]
        number = host.position[row, columns] // size
        document = host.document[row, columns]
        begins = np.ones(len(columns), bool)
        begins[1:] = (np.diff(number) != 0) | (np.diff(document) != 0)
        starts = begins.nonzero()[0]
        pieces = np.split(columns, starts[1:]) if len(columns) else []
        found.append([piece for piece in pieces if len(piece) == size])
        if pieces and len(pieces[-1]) < size:
            waiting[row, pieces[-1]] = True
    count = max((len(groups) for groups in found), default=0)
    members, there = np.zeros((B, count, size), np.int64), np.zeros((B, count), bool)
    for row, groups in enumerate(found):
        if groups:
            members[row, : len(groups)], there[row, : len(groups)] = np.stack(groups), True
    last, rows = members[..., -1], np.arange(B)[:, None]
    flags = (host.is_global[rows[..., None], members].any(-1) if count else there) & there

    def of_last(field: np.ndarray) -> np.ndarray:
        return field[rows, last]

    ends = Host(of_last(host.position), there, flags, of_last(host.document), of_last(host.length))
    groups_ = ends._replace(position=ends.position // size, length=ends.length // size)
    places = Layout.known(groups_, device), Layout.known(ends, device)
    return Pooled(*places, tensor_of(members, device), waiting)
