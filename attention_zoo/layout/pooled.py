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
        columns: the same as `members` on the host; -1 where one is no token.
        missing: [B, G, k, 1], members that are no tokens, of groups that are not complete; None: there are none.
    """

    groups: Layout
    ends: Layout
    members: Int[Tensor, "B G k"]
    waiting: Bool[np.ndarray, "B L"]
    columns: Int[np.ndarray, "B G k"]
    missing: Bool[Tensor, "B G k 1"] | None = None

    def take(self, x: Tensor) -> Tensor:
        """[B, L, ...] of tokens -> [B, G, k, ...] of the groups' members, with zeros where these are missing."""
        B, G, k = self.members.shape
        index = self.members.reshape(B, G * k, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        taken = x.gather(1, index).unflatten(1, (G, k))
        return taken if self.missing is None else taken.masked_fill(self.missing.view(B, G, k, *[1] * (x.ndim - 2)), 0)


def pooled(tokens: Tokens, size: int, *, partial: bool = False) -> Pooled:
    """Groups of `size` tokens; of a `Layout`, the same object for the same size.

    Args:
        partial: whether groups of which only some tokens are there count, too.
    """
    at_least(1, size=size)
    layout = Layout.of(tokens)
    return layout.plan(("pooled", size, partial), lambda: _pooled(layout, size, partial))


def _pooled(layout: Layout, size: int, partial: bool) -> Pooled:
    host, device = layout.host, layout.valid.device
    B, L = host.valid.shape
    row, column = host.valid.nonzero()  # row after row
    number, place = np.divmod(host.position[row, column], size)
    begins = np.ones(len(row), bool)
    begins[1:] = (np.diff(row) != 0) | (np.diff(number) != 0) | (np.diff(host.document[row, column]) != 0)
    group, count = begins.cumsum() - 1, np.diff(np.append(begins.nonzero()[0], len(row)))
    final = np.ones(len(row), bool)
    final[:-1] = np.diff(row) != 0
    waiting = np.zeros((B, L), bool)
    waits = np.zeros(len(count), bool)
    waits[group[final]] = count[group[final]] < size
    waiting[row[waits[group]], column[waits[group]]] = True
    kept = count > 0 if partial else count == size
    home = row[begins]  # of each group
    slot = kept.cumsum() - 1
    slot = slot - np.concatenate([[0], np.bincount(home[kept], minlength=B).cumsum()])[home]
    G = int(slot[kept].max(initial=-1)) + 1
    members, held = np.zeros((B, G, size), np.int64), np.zeros((B, G, size), bool)
    here = kept[group]
    where = row[here], slot[group[here]], place[here]
    members[where], held[where] = column[here], True
    there = np.asarray(held.any(-1))
    last = np.where(held, members, 0).max(-1, initial=0)
    rows = np.arange(B)[:, None]
    flags = np.asarray((host.is_global[rows[..., None], members] & held).any(-1))
    of_last = (field[rows, last] for field in (host.position, host.document, host.length))
    position, document, length = of_last
    ends = Host(position, there, flags, document, length)
    groups = ends._replace(position=position // size, length=length // size)
    places = Layout.known(groups, device), Layout.known(ends, device)
    missing = None
    if partial and not bool((held.all(-1) | ~there).all()):
        missing = tensor_of(~held[..., None], device)
    return Pooled(*places, tensor_of(members, device), waiting, np.where(held, members, -1), missing)
