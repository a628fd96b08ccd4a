"""Tokens halved again and again: at level l a column stands for up to 2^l tokens of one document.

Group g of level l holds the tokens at positions g·2^l ... (g + 1)·2^l - 1 that there are; a document's last one may be
smaller. Padding, holes and borders of documents fall into none. All levels together have as many columns as there
are tokens, and a few.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.layout.grid import taken
from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout


class Level(NamedTuple):
    """The groups of one level, G columns; rows with fewer are filled up with padding at the end.

    Fields:
        groups: the groups as tokens, at position g of their document.
        halves: [B, 2G], columns of the level below: the two halves of each group; any where there is none.
        share: [B, 2G], which part of the group's tokens each half has; 0 where there is none. float64.
        log_count: [B, G], logarithm of how many tokens a group has. float64.
        paired: whether the halves of group g are columns 2g and 2g + 1 in every row.
    """

    groups: Layout
    halves: Int[Tensor, "B n"]
    share: Float[Tensor, "B n"]
    log_count: Float[Tensor, "B G"]
    paired: bool

    def mean(self, x: Float[Tensor, "B K S D"]) -> Float[Tensor, "B K G D"]:
        """Of each group's tokens, from those of the level below."""
        share = self.groups.plan(("share", x.dtype), lambda: self.share.to(x.dtype)[:, None, :, None])
        more = share.shape[2] - x.shape[2]  # or less
        both = x if self.paired else taken(x, self.halves)
        if self.paired and more:
            both = nn.functional.pad(x, (0, 0, 0, more))
        return (both * share).unflatten(2, (-1, 2)).sum(3)


def levels(layout: Layout, count: int) -> list[Level]:
    """Levels 1 ... `count` of a layout's tokens; the same objects for the same layout."""
    known: list[tuple[Level, Array]] = layout.plan("levels", list)
    made: list[Level] = []
    below, sizes = layout, np.ones(layout.host.valid.shape, np.int64)
    for number in range(1, count + 1):
        if number > len(known):
            known.append(_halved(below, sizes))
        level, sizes = known[number - 1]
        made.append(level)
        below = level.groups
    return made


def _halved(below: Layout, size: Int[np.ndarray, "B S"]) -> tuple[Level, Int[np.ndarray, "B G"]]:
    """The level above one whose columns hold so many tokens, and how many its own hold."""
    host, device = below.host, below.valid.device
    B, S = host.valid.shape
    number = host.position >> 1
    # the two halves of a group stand in consecutive valid columns
    order = np.argsort(~host.valid, axis=1, kind="stable")  # valid columns first
    valid, number, document = (np.take_along_axis(x, order, 1) for x in (host.valid, number, host.document))
    begins = valid.copy()
    begins[:, 1:] &= (number[:, 1:] != number[:, :-1]) | (document[:, 1:] != document[:, :-1])
    group = begins.cumsum(1) - 1
    G = int(begins.sum(1).max(initial=0))
    row = np.broadcast_to(np.arange(B)[:, None], (B, S))[valid]
    target = 2 * group[valid] + ~begins[valid]
    halves, held = np.zeros((B, 2 * G), np.int64), np.zeros((B, 2 * G), np.int64)
    halves[row, target] = order[valid]
    held[row, target] = np.take_along_axis(size, order, 1)[valid]
    whole = held.reshape(B, G, 2).sum(2)
    first = host.take(halves[:, ::2])
    there = whole > 0
    groups = Host(
        first.position >> 1, there, np.zeros_like(there), np.where(there, first.document, 0), (first.length + 1) >> 1
    )
    paired = bool(((halves == np.arange(2 * G)) | (held == 0)).all())
    share = held / np.repeat(whole.clip(min=1), 2, 1)
    place, part, log = (tensor_of(x, device) for x in (halves, share, np.log(whole.clip(min=1))))
    return Level(Layout.known(groups, device), place, part, log, paired), whole
