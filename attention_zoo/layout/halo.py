"""What a process needs of the columns before its own, where a token sees only so far back: found without asking.

Everyone knows the whole sequence's tokens, so everyone finds what each needs: tokens of the document that a row's first
own token is in, since that reaches back the farthest. A halo may span several processes; a document that begins with
the own columns needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from attention_zoo.layout.host import Array
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import behind
from attention_zoo.layout.placement import Placement
from attention_zoo.rules import Unsupported

Oldest = Callable[[Array], Array]


class Halo(NamedTuple):
    """Columns before each process's own.

    Fields:
        needs: of each process, rising columns of the whole sequence.
        keys: this process's halo and own columns, one after another; what it fetches without needing it is padding.
        width: columns of this process's halo.
        within: whether some process's halo holds tokens of the segment that its own columns go on with.
    """

    needs: tuple[Array, ...]
    keys: Layout
    width: int
    within: bool


def halo(
    layout: Layout,
    key: Hashable,
    oldest: Oldest,
    *,
    segment: int = 1,
    last: int | None = None,
    asked: Placement | None = None,
) -> Halo:
    """What stands before the columns of each process; the same object for the same key.

    Args:
        layout: of a process's own columns, with their placement.
        oldest: position of a row's first own token -> of the oldest token that is needed, maybe below 0.
        segment: tokens of a segment, for `within`.
        last: so many valid tokens of the document at most, wherever they stand; None: any number.
        asked: of the tokens whose first ones say the document, where these are other columns than the layout's.

    Raises:
        Unsupported: where a process owns several runs of columns.
    """
    placement = layout.placement if asked is None else asked
    return layout.plan(("halo", key), lambda: _halo(layout, placement, oldest, segment, last))


def _halo(layout: Layout, asked: Placement, oldest: Oldest, segment: int, last: int | None) -> Halo:
    placement: Placement = layout.placement
    host, asking = placement.whole.host, asked.whole.host
    if not np.array_equal(np.concatenate(placement.columns), np.arange(host.valid.shape[1])):
        raise _in_several_runs()  # what comes lies in the order of processes
    valid = [np.flatnonzero(row) for row in host.valid]
    needs, within = [], False
    mine: list[Array] = []
    for rank, columns in enumerate(placement.columns):
        rows = []
        for row, there in enumerate(valid):
            tokens = asked.columns[rank][asking.valid[row, asked.columns[rank]]]
            if not len(tokens) or not len(columns):
                rows.append(there[:0])
                continue
            own = np.searchsorted(there, columns[0])
            position, document = (field[row, tokens[0]] for field in (asking.position, asking.document))
            earliest = int(oldest(position[None])[0])
            # positions rise by one at least, so no more tokens than that
            reach = int(position) - earliest if last is None else last
            found = there[max(0, own - max(0, reach)) : own]
            known = (host.document[row, found] == document) & (
                last is not None or host.position[row, found] >= earliest
            )
            found = found[known]
            within |= bool((host.position[row, found] >= position - position % segment).any())
            rows.append(found)
        needs.append(np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64))
        if rank == placement.rank:
            mine = rows
    return _behind(layout, tuple(needs), mine, within=within)


def held_before(layout: Layout, span: int) -> Halo:
    """What a state that came from the process before would hold: of each row's document that stood last before the own
    columns its tokens within `span` positions of the next, whether an own token goes on with it or not.

    `keys` knows which document that is and where it stands, be there own tokens or none.

    Raises:
        Unsupported: where columns are not in the order of processes, in one run each.
    """
    return layout.plan(("held before", span), lambda: _held_before(layout, span))


def _held_before(layout: Layout, span: int) -> Halo:
    placement: Placement = layout.placement
    host = placement.whole.host
    starts = np.cumsum([0, *map(len, placement.columns)])
    if not np.array_equal(np.concatenate(placement.columns), np.arange(starts[-1])):
        raise _in_several_runs()
    valid = [np.flatnonzero(row) for row in host.valid]
    needs = []
    mine: list[Array] = []
    for rank, start in enumerate(starts[:-1]):
        rows = []
        for row, there in enumerate(valid):
            stop = int(np.searchsorted(there, start))
            found = there[max(0, stop - span) : stop]
            if len(found):
                position, document = host.position[row, found], host.document[row, found]
                found = found[(document == document[-1]) & (position > position[-1] - span)]
            rows.append(found)
        needs.append(np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64))
        if rank == placement.rank:
            mine = rows
    return _behind(layout, tuple(needs), mine, within=True)


def _behind(layout: Layout, needs: tuple[Array, ...], mine: list[Array], *, within: bool) -> Halo:
    """Args: mine: of each row, which of this process's needs."""
    placement: Placement = layout.placement
    own = needs[placement.rank]
    before = Placement.chosen(placement.whole, own)
    wanted = np.stack([np.isin(own, row) for row in mine]) if mine else np.zeros((0, len(own)), bool)
    if not bool(wanted.all()):
        before = Layout.known(before.host.only(wanted), layout.valid.device)
    return Halo(needs, behind(before, layout) if len(own) else layout, len(own), within)


def _in_several_runs() -> Unsupported:
    return Unsupported(
        "a halo", "columns in several runs", "what stands before the own columns is one stretch",
        "contiguous columns (zig-zag is for models of rings alone)",
    )  # fmt: skip
