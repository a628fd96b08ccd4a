"""Which state of a recurrence over blocks each token sees: the one that the blocks before its own have left.

A block is `size` tokens of one document, counted by position (`layout.pooled`). A document begins with the initial
state, and one that earlier calls began goes on with theirs. Documents do not wait for each other: each is a *lane*, and
a turn goes through the next complete block of every lane that has one, whatever row it stands in. So there are as many
turns as the longest document has blocks. Lanes stand in the order of their lengths, the longest first, so that those of
a turn are the first ones of the turn before, and nothing is computed for lanes that have ended.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attention_zoo.layout.host import Array, Host
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.pooled import pooled


class Turns(NamedTuple):
    """A call's n complete blocks in the order in which they are gone through, G turns.

    States are numbered: 0 the initial one; 1 + b what row b held, where states are kept; behind these, what each block
    leaves, in the order of the blocks.

    Fields:
        members: [n, size], the columns of each block's tokens, as rows of [B · S] of all keys.
        counts: [G], how many blocks each turn goes through; they never rise.
        start: [counts[0]], the number of the state that each lane begins with.
        block: [n], which block of its document each is.
        which: [B, L], the number of the state that each token sees; any at padding.
        last: [B], the number of the state that the next token of each row's current document sees.
    """

    members: Int[np.ndarray, "n w"]
    counts: Int[np.ndarray, " G"]
    start: Int[np.ndarray, " lanes"]
    block: Int[np.ndarray, " n"]
    which: Int[np.ndarray, "B L"]
    last: Int[np.ndarray, " B"]

    @property
    def turns(self) -> int:
        """G."""
        return len(self.counts)

    @property
    def held_alone(self) -> bool:
        """Whether nothing is asked for but what rows held."""
        B = len(self.which)
        row = np.arange(B)
        return not self.turns and bool((self.which == 1 + row[:, None]).all() and (self.last == 1 + row).all())


class _Blocks(NamedTuple):
    """Complete blocks, row after row, document after document.

    Fields:
        row, document, number: [n]; which block of its document each is.
        members: [n, size], columns of its row.
    """

    row: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    number: Int[np.ndarray, " n"]
    members: Int[np.ndarray, "n w"]

    @property
    def lane(self) -> Int[np.ndarray, " n"]:
        """The number of each one's document, from 0 on."""
        begins = np.ones(len(self.row), bool)
        begins[1:] = (np.diff(self.row) != 0) | (np.diff(self.document) != 0)
        return begins.cumsum() - 1

    def some(self, kept: Array) -> _Blocks:
        return _Blocks(*(field[kept] for field in self))


def turns(tokens: Layout, keys: Layout, held: Host, size: int, keeps: bool) -> Turns:
    """The blocks of a call.

    Args:
        tokens: of the call.
        keys: what is held and the call's own, of which the call's are the last columns.
        held: what was held before the call.
        size: of a block.
        keeps: whether states are kept: there is one before the call, and one is asked for after it.
    """
    mine, after = tokens.host, keys.host
    B, S = after.valid.shape
    blocks = _complete(keys, held, mine, size)
    known, row = held.last_document, np.arange(B)[:, None]
    asked = mine.document, mine.position // size
    following = after.last_document, after.next_position[:, None] // size
    # without blocks whose state nobody sees: such as a document's last one, where no state is kept
    seen = [_before(blocks, *asked)[mine.valid], *([_before(blocks, *following).reshape(-1)] if keeps else [])]
    blocks = _needed(blocks, np.concatenate(seen))
    order, counts = _in_turns(blocks.lane)
    first = 1 + B if keeps else 1
    place = np.empty(len(order), np.int64)
    place[order] = first + np.arange(len(order))

    def number(document: Array, block: Array) -> Array:
        """Of the state that tokens of these documents see in these blocks, [B, n]."""
        found = _before(blocks, document, block)
        begun = np.where((document == known) & (known >= 0), 1 + row, 0)
        return np.where(found >= 0, place[found], begun) if len(place) else begun

    last = number(*following)
    lanes = order[: counts[0]] if len(counts) else order
    start = np.where(blocks.document[lanes] == known[blocks.row[lanes], 0], 1 + blocks.row[lanes], 0)
    return Turns(
        (blocks.members + blocks.row[:, None] * S)[order], counts, start,
        blocks.number[order], _filled(number(*asked), mine.valid, last), last[:, 0],
    )  # fmt: skip


def _complete(keys: Layout, held: Host, mine: Host, size: int) -> _Blocks:
    """The complete blocks that no earlier call has gone through."""
    if held.valid.shape[1] and not bool((mine.valid & ((mine.position + 1) % size == 0)).any()):
        nothing = np.zeros(0, np.int64)  # no block ends here, as in most steps of decoding
        return _Blocks(nothing, nothing, nothing, np.zeros((0, size), np.int64))
    found = pooled(keys, size)
    groups, members = found.groups.host, found.members.numpy(force=True)
    past = groups.position < held.next_position[:, None] // size
    gone = (groups.document < held.last_document) | ((groups.document == held.last_document) & past)
    new = groups.valid & ~gone
    return _Blocks(new.nonzero()[0], groups.document[new], groups.position[new], members[new])


def _before(blocks: _Blocks, document: Array, block: Array) -> Array:
    """For each [B, n] block of a document, the last of its row that is of that document, before it; -1: none."""
    row = np.arange(len(document))[:, None]
    if not len(blocks.row):
        return np.full(document.shape, -1)
    ids = np.union1d(blocks.document, document)
    stride = int(max(blocks.number.max(initial=0), block.max(initial=0))) + 2
    known = (blocks.row * len(ids) + np.searchsorted(ids, blocks.document)) * stride + blocks.number  # they rise
    wanted = (row * len(ids) + np.searchsorted(ids, document)) * stride + block
    found = np.searchsorted(known, wanted) - 1
    return np.where((found >= 0) & (known[found.clip(min=0)] // stride == wanted // stride), found, -1)


def _needed(blocks: _Blocks, seen: Array) -> _Blocks:
    """Of each document those up to the last whose state is seen."""
    seen, lane = seen[seen >= 0], blocks.lane
    last = np.full(len(lane), -1)
    np.maximum.at(last, lane[seen], seen)
    return blocks.some(np.arange(len(lane)) <= last[lane])


def _in_turns(lane: Int[np.ndarray, " n"]) -> tuple[Array, Int[np.ndarray, " G"]]:
    """The order in which blocks of these lanes are gone through, and how many each turn has."""
    lengths = np.bincount(lane)
    rank = np.argsort(np.argsort(-lengths, kind="stable"), kind="stable")
    turn = np.arange(len(lane)) - (lengths.cumsum() - lengths)[lane]
    return np.lexsort((rank[lane], turn)), np.bincount(turn)


def _filled(which: Array, valid: Array, otherwise: Array) -> Array:
    """Padding joins whoever stands before it, or after it, so that it parts nobody; rows of padding are `otherwise`."""
    if not which.shape[1]:  # a process may own no column
        return which
    column = np.where(valid, np.arange(which.shape[1]), valid.argmax(1)[:, None])
    filled = np.take_along_axis(which, np.maximum.accumulate(column, 1), 1)
    return np.where(valid.any(1, keepdims=True), filled, otherwise)
