"""Which state of a recurrence over blocks each token sees: the one that the blocks before its own have left.

A block is `size` tokens of one document, counted by position (`layout.pooled`). A row's complete blocks are gone
through in order; a document begins with the initial state, and one that earlier calls began goes on with theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attention_zoo.layout.host import Array, Host
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.pooled import Pooled, pooled


class Turns(NamedTuple):
    """A call's blocks in the order in which they are gone through, G turns for all rows at once.

    States are numbered: 0 the initial one; 1 + b what row b held, where states are kept; behind these, g · B + b what
    turn g leaves in row b.

    Fields:
        members: [B, G, size], the columns among all keys of each turn's tokens; any where a row has fewer blocks.
        before: [B, G], the number of the state that each turn begins with.
        block: [B, G], which block of its document each is.
        which: [B, L], the number of the state that each token sees; any at padding.
        last: [B], the number of the state that the next token of each row's current document sees.
    """

    members: Int[np.ndarray, "B G w"]
    before: Int[np.ndarray, "B G"]
    block: Int[np.ndarray, "B G"]
    which: Int[np.ndarray, "B L"]
    last: Int[np.ndarray, " B"]

    @property
    def turns(self) -> int:
        """G."""
        return self.members.shape[1]

    @property
    def held_alone(self) -> bool:
        """Whether nothing is asked for but what rows held."""
        B = len(self.which)
        row = np.arange(B)
        return not self.turns and bool((self.which == 1 + row[:, None]).all() and (self.last == 1 + row).all())


def turns(tokens: Layout, keys: Layout, held: Host, size: int, keeps: bool) -> Turns:
    """The blocks of a call.

    Args:
        tokens: of the call.
        keys: what is held and the call's own, of which the call's are the last columns.
        held: what was held before the call.
        size: of a block.
        keeps: whether states are kept: there is one before the call, and one is asked for after it.
    """
    mine = tokens.host
    B = len(mine.valid)
    if held.valid.shape[1] and not bool((mine.valid & ((mine.position + 1) % size == 0)).any()):
        found = _none(B, size)  # no block ends here, as in most steps of decoding
    else:
        found = _complete(pooled(keys, size), held, size)
    members, document, index, there = found
    known, row = held.last_document, np.arange(B)[:, None]
    first = 1 + B if keeps else 1

    def number(asked: Array, block: Array) -> Array:
        """Of the state that tokens of these documents see in these blocks, [B, n]."""
        turn = _turn_before(document, index, there, asked, block)
        begun = (asked == known) & (known >= 0)
        return np.where(turn >= 0, first + turn * B + row, np.where(begun, 1 + row, 0))

    after = keys.host
    last = number(after.last_document, after.next_position[:, None] // size)
    which = _filled(number(mine.document, mine.position // size), mine.valid, last)
    asked = [which.reshape(-1), last[:, 0]] if keeps else [which.reshape(-1)]
    # without turns whose state nobody sees: such as the last block's, where no state is kept
    needed = slice(0, int(((np.concatenate(asked) - first) // B).max(initial=-1)) + 1)
    before = np.where(there, number(document, index), 0)
    return Turns(members[:, needed], before[:, needed], index[:, needed], which, last[:, 0])


def _none(B: int, size: int) -> tuple[Array, ...]:
    nothing = np.zeros((B, 0), np.int64)
    return np.zeros((B, 0, size), np.int64), nothing, nothing, nothing.astype(bool)


def _complete(found: Pooled, held: Host, size: int) -> tuple[Array, ...]:
    """Members, document, index and presence of the complete blocks that no earlier call has gone through."""
    groups = found.groups.host
    members = found.members.numpy(force=True)
    past = groups.position < held.next_position[:, None] // size
    gone = (groups.document < held.last_document) | ((groups.document == held.last_document) & past)
    new = groups.valid & ~gone
    order = np.argsort(~new, axis=1, kind="stable")[:, : int(new.sum(1).max(initial=0))]
    chosen = groups.take(order)
    members = np.take_along_axis(members, order[..., None], 1)
    return members, chosen.document, chosen.position, np.take_along_axis(new, order, 1)


def _turn_before(document: Array, index: Array, there: Array, asked: Array, block: Array) -> Array:
    """For each [B, n] block of a document, the last turn of its row that is of that document, before it; -1: none."""
    row = np.arange(len(there))[:, None]
    ids = np.union1d(document[there], asked)
    stride = int(max(index.max(initial=0), block.max(initial=0))) + 2
    turns = ((row * len(ids) + np.searchsorted(ids, document)) * stride + index)[there]  # they rise, row after row
    wanted = (row * len(ids) + np.searchsorted(ids, asked)) * stride + block
    found = np.searchsorted(turns, wanted) - 1
    if not len(turns):
        return found
    own = (found >= 0) & (turns[found.clip(min=0)] // stride == wanted // stride)
    before = there.sum(1).cumsum()[:, None] - there.sum(1)[:, None]
    return np.where(own, found - before, -1)


def _filled(which: Array, valid: Array, otherwise: Array) -> Array:
    """Padding joins whoever stands before it, or after it, so that it parts nobody; rows of padding are `otherwise`."""
    column = np.where(valid, np.arange(which.shape[1]), valid.argmax(1)[:, None])
    filled = np.take_along_axis(which, np.maximum.accumulate(column, 1), 1)
    return np.where(valid.any(1, keepdims=True), filled, otherwise)
