"""Documents cut into segments of S positions, and the order in which a recurrence over segments takes them: in rounds.

A *piece* is what one call has of one segment: the valid tokens of a document whose position // S is the same. Round r
takes the r-th piece of every row, whatever segment of whatever document that is, so that rows of a batch go through
together and the host loops over rounds, never over tokens. The columns of all rounds stand side by side in one tensor
(`slots`): cut once on the way in, joined once on the way out, in time linear in the length.

Letters: B batch, L columns of the call, R rounds, T columns of all rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, before, tensor_of


class Pieces(NamedTuple):
    """The pieces of a call; arrays of the host, each [B, R] where nothing else is said.

    Fields:
        host: of the call.
        width: [R], columns of each round: the tokens of its longest piece.
        slot: [B, L], the column of each valid token among those of all rounds.
        column: [B, T], the way back: which column of the call stands there; any where there is none.
        here: [B, T], whether one stands there.
        exists: whether the row has such a piece.
        follows: whether the piece before it in the row is of the same document.
        left: how many pieces of the same document come after it in this call.
        segment: number of the segment within its document.
        starts, completes: whether the first, the last token of the segment is among its tokens.
    """

    host: Host
    width: Int[np.ndarray, " R"]
    slot: Int[np.ndarray, "B L"]
    column: Int[np.ndarray, "B T"]
    here: Bool[np.ndarray, "B T"]
    exists: Bool[np.ndarray, "B R"]
    follows: Bool[np.ndarray, "B R"]
    left: Int[np.ndarray, "B R"]
    segment: Int[np.ndarray, "B R"]
    starts: Bool[np.ndarray, "B R"]
    completes: Bool[np.ndarray, "B R"]

    @property
    def in_order(self) -> bool:
        """Whether the columns of the rounds are those of the call."""
        return self.slot.shape == self.column.shape and bool(self.here.all())

    def split(self, x: Float[Tensor, "B L E"]) -> tuple[Float[Tensor, "B _ E"], ...]:
        """The columns of each round; zeros where a row has none."""
        if not self.in_order:
            there = tensor_of(~self.here[..., None], x.device)
            x = _taken(x, self.column).masked_fill(there, 0)
        return x.split(self.width.tolist(), 1)

    def joined(self, rounds: list[Float[Tensor, "B _ E"]]) -> Float[Tensor, "B L E"]:
        """What the rounds made of their columns, in the places of the call; zeros at padding."""
        x = torch.cat(rounds, 1)
        if self.in_order:
            return x
        return _taken(x, self.slot).masked_fill(tensor_of(~self.host.valid[..., None], x.device), 0)


def _taken(x: Tensor, columns: Array) -> Tensor:
    return x.gather(1, tensor_of(columns, x.device)[..., None].expand(*columns.shape, x.shape[-1]))


def pieces(host: Host, size: int) -> Pieces:
    """The pieces of these tokens, in segments of `size`. There is one round at least, be it of no tokens."""
    valid, segment = host.valid, host.position // size
    B = len(valid)
    earlier = before(valid)
    at = earlier.clip(min=0)
    same = earlier >= 0
    for field in (host.document, segment):
        same &= np.take_along_axis(field, at, 1) == field
    begins = valid & ~same
    number = (begins.cumsum(1) - 1).clip(min=0)  # of the piece in its row
    row, column = valid.nonzero()
    piece = number[row, column]
    R = int(piece.max(initial=0)) + 1
    count = np.zeros((B, R), np.int64)
    np.add.at(count, (row, piece), 1)
    width = count.max(0, initial=1)
    # of a valid token: its rank in its piece, behind the columns of the rounds before
    order = valid.cumsum(1) - 1
    rank = order - np.maximum.accumulate(np.where(begins, order, 0), 1)
    slot = np.where(valid, (width.cumsum() - width)[number] + rank, 0)
    back, here = np.zeros((B, int(width.sum())), np.int64), np.zeros((B, int(width.sum())), bool)
    back[row, slot[row, column]], here[row, slot[row, column]] = column, True

    def of_first(field: Array) -> Array:
        found = np.zeros((B, R), np.int64)
        found[begins.nonzero()[0], number[begins]] = field[begins]
        return found

    exists, document, position = count > 0, of_first(host.document), of_first(host.position)
    goes_on = np.zeros((B, R + 1), bool)
    goes_on[:, 1:R] = exists[:, 1:] & (document[:, 1:] == document[:, :-1])
    left = np.zeros((B, R + 1), np.int64)
    for one in range(R - 2, -1, -1):
        left[:, one] = np.where(goes_on[:, one + 1], left[:, one + 1] + 1, 0)
    return Pieces(
        host, width, slot, back, here, exists, goes_on[:, :R], left[:, :R], position // size,
        exists & (position % size == 0), exists & ((position + count) % size == 0),
    )  # fmt: skip
