"""Where memories end and compressed memories begin, found on the host for all layers that divide alike.

Letters: S tokens a segment, M of memory, c a group, C compressed slots. Segment s begins at position s·S; its memory at
m(s) = floor((s·S - M)/c)·c, or 0; before it stand the groups 0 ... m(s)/c - 1, of which it sees the last C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.pooled import pooled
from attention_zoo.ops.relative.few import Few
from attention_zoo.ops.relative.segment_tiles import PiecePlan, Pieces, Run

FILLED = 2
"""Times as many scores as there are pairs that pieces may be filled up to, to run together."""
FEW_SCORES = 1 << 22
"""Of a head; so many may be filled up whatever the share."""
FEW_RUNS = 8
"""A piece's keys are copied run by run up to so many runs, else one by one."""


class Sizes(NamedTuple):
    """How a document is divided: S, M, c and C as above."""

    segment: int
    memory: int
    ratio: int
    slots: int

    def memory_from(self, segment: Array) -> Array:
        """m(s)."""
        start = (segment * self.segment - self.memory).clip(min=0)
        return start - start % self.ratio

    def evicting(self, group: Array) -> Array:
        """The segment whose end pushes a group out of memory: the first s of which m(s + 1) lies behind it."""
        return -(-((group + 1) * self.ratio + self.memory) // self.segment) - 1


class Finder:
    """Columns of positions in documents."""

    def __init__(self, host: Host, documents: Array):
        self.documents, self.columns = documents, host.valid.shape[1]
        self.stride = int(np.where(host.valid, host.position, 0).max(initial=0)) + 1
        self.row = (len(documents) + 1) * self.stride
        code = np.where(host.valid, self._code(host.document, host.position), -1)
        code = np.maximum.accumulate(code, 1) if self.columns else code
        self.codes = (code + np.arange(len(code))[:, None] * self.row).ravel()

    def _code(self, document: Array, position: Array) -> Array:
        return np.searchsorted(self.documents, document) * self.stride + position

    def __call__(self, row: Array, document: Array, position: Array) -> Array:
        """The column in the row of each position, -1 where it is not there; the arguments are broadcast."""
        if not self.codes.size:
            return np.full(np.broadcast_shapes(np.shape(row), np.shape(document), np.shape(position)), -1)
        code = self._code(document, position) + row * self.row
        found = np.searchsorted(self.codes, code)
        there = (position >= 0) & (position < self.stride) & (found < len(self.codes))
        there &= self.codes[found.clip(max=len(self.codes) - 1)] == code
        return np.where(there, found - row * self.columns, -1)


class Evicted(NamedTuple):
    """Groups that leave memory together: those of one segment's end, of one document; n of these.

    Fields:
        row: [n].
        queries: [n, S], columns of the segment's tokens among the keys; -1 where there is none.
        slots: [n, g], which of the new slots.
        tokens: [n, g · c], columns of what they are made of.
        segment: [n].
    """

    row: Int[np.ndarray, " n"]
    queries: Int[np.ndarray, "n S"]
    slots: Int[np.ndarray, "n g"]
    tokens: Int[np.ndarray, "n gc"]
    segment: Int[np.ndarray, " n"]

    def only(self, mask: Bool[np.ndarray, " n"]) -> Evicted:
        """Those that are marked."""
        return Evicted(*(field[mask] for field in self))


class Picked(NamedTuple):
    """`Evicted` on the device.

    Fields:
        row: [n, 1].
        queries: [n, S]; any where there is none.
        hidden: [n, 1, S, 1], where there is none; None: nowhere.
        slots: [n, g], which of the new slots.
        tokens: [n, g · c].
    """

    row: Int[Tensor, "n 1"]
    queries: Int[Tensor, "n S"]
    hidden: Bool[Tensor, "n 1 S 1"] | None
    slots: Int[Tensor, "n g"]
    tokens: Int[Tensor, "n gc"]

    @staticmethod
    def of(each: Evicted, device: torch.device) -> Picked:
        missing = each.queries < 0
        some = tensor_of(missing[:, None, :, None], device) if bool(missing.any()) else None

        def here(x: Array) -> Tensor:
            return tensor_of(x, device)

        return Picked(
            here(each.row[:, None]), here(each.queries.clip(min=0)), some, here(each.slots), here(each.tokens)
        )

    def split(self, size: int) -> Iterator[Picked]:
        """So many of the n at a time."""
        if size >= len(self.row):
            yield self
            return
        for start in range(0, len(self.row), size):
            yield Picked(*(None if x is None else x[start : start + size] for x in self))  # type: ignore[arg-type]


class Slots(NamedTuple):
    """What a call compresses, and the compressed memory that it works with: slots held, then new ones.

    Fields:
        layout: of the G slots; positions are numbers of groups.
        new: how many of them are new, the last.
        taps: [B, new, t], columns of the tokens that a new slot is made of, or wider.
        missing: [B, new, t], taps that are not there; None: none.
        evicted: the new ones by what they left memory with, alike ones together.
        kept: [B, n], columns of the slots that the next token can see; None: all.
        kept_layout: what they are.
    """

    layout: Layout
    new: int
    taps: Int[Tensor, "B new t"]
    missing: Bool[Tensor, "B new t"] | None
    evicted: tuple[Evicted, ...]
    kept: Int[Tensor, "B n"] | None
    kept_layout: Layout


def picked_of(layout: Layout, slots: Slots) -> tuple[Picked, ...]:
    """What leaves memory, on the layout's device, found once for all layers."""

    def find() -> tuple[tuple[Picked, ...], Slots]:
        return tuple(Picked.of(each, layout.valid.device) for each in slots.evicted), slots

    return layout.plan(("evicted", id(slots)), find)[0]


def slots_of(keys: Layout, held: Layout, sizes: Sizes, dilation: int) -> Slots:
    """Of the keys, and the slots that were held before; the same object for the same of all."""
    key = ("compressed", id(held), sizes, dilation)
    return keys.plan(key, lambda: (_slots(keys, held, sizes, dilation), held))[0]


def _slots(keys: Layout, held: Layout, sizes: Sizes, dilation: int) -> Slots:
    groups, c = pooled(keys, sizes.ratio), sizes.ratio
    mine, host, before = groups.groups.host, keys.host, held.host
    B = len(host.valid)
    documents = np.union1d(np.union1d(host.document, before.document), [0])
    # what of each document is out of memory once its last token is there; and what was compressed already
    out = np.zeros((B, len(documents)), np.int64)
    done = np.zeros((B, len(documents)), np.int64)
    row = np.broadcast_to(np.arange(B)[:, None], host.valid.shape)
    at = row[host.valid], np.searchsorted(documents, host.document[host.valid])
    np.maximum.at(out, at, sizes.memory_from((host.position[host.valid] + 1) // sizes.segment) // c)
    row = np.broadcast_to(np.arange(B)[:, None], before.valid.shape)
    at = row[before.valid], np.searchsorted(documents, before.document[before.valid])
    np.maximum.at(done, at, before.position[before.valid] + 1)
    index = np.arange(B)[:, None], np.searchsorted(documents, mine.document)
    wanted = mine.valid & (mine.position >= done[index]) & (mine.position < out[index]) & (sizes.slots > 0)
    new = int(wanted.sum(1).max(initial=0))
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :new]
    chosen = mine.take(order).only(np.take_along_axis(wanted, order, 1)) if new else mine.cut(slice(0, 0))
    device, finder = keys.valid.device, Finder(host, documents)
    layout = held if not new else Layout.known(before.then(chosen), device)
    end = np.arange(c - 1, -1, -1) * dilation
    rows = np.arange(B)[:, None, None]
    taps = finder(rows, chosen.document[..., None], chosen.position[..., None] * c + c - 1 - end)
    missing = taps < 0
    kept, kept_layout = _kept(layout, host, sizes)
    return Slots(
        layout, new, tensor_of(taps.clip(min=0), device),
        tensor_of(missing, device) if bool(missing.any()) else None,
        _evicted(chosen, finder, sizes), None if kept is None else tensor_of(kept, device), kept_layout,
    )  # fmt: skip


def _kept(layout: Layout, keys: Host, sizes: Sizes) -> tuple[Array | None, Layout]:
    """The slots that a segment with the row's next token sees."""
    following = keys.next_position[:, None] // sizes.segment
    end = sizes.memory_from(following) // sizes.ratio
    host, current = layout.host, keys.last_document
    # a row without memory and without new tokens goes on where it was
    live = host.valid & ((host.document == current) | (current < 0)) & (host.position >= end - sizes.slots)
    if bool(live.all()):
        return None, layout
    count = int(live.sum(1).max(initial=0))
    columns = np.argsort(live, axis=1, kind="stable")[:, live.shape[1] - count :]
    kept = host.take(columns).only(np.take_along_axis(live, columns, 1))
    return columns, Layout.known(kept, layout.valid.device)


def _evicted(chosen: Host, finder: Finder, sizes: Sizes) -> tuple[Evicted, ...]:
    """The new slots by row, document and the segment that evicts them; those of as many slots together."""
    row, column = chosen.valid.nonzero()
    if not len(row):
        return ()
    document, group = chosen.document[row, column], chosen.position[row, column]
    segment = sizes.evicting(group)
    starts = np.flatnonzero(_changes(row, document, segment))
    counts = np.diff([*starts, len(row)])
    found = []
    for count in np.unique(counts):
        first = starts[counts == count]
        slots = first[:, None] + np.arange(count)
        mine = row[first][:, None], document[first][:, None]
        own = segment[first][:, None] * sizes.segment + np.arange(sizes.segment)
        tokens = (group[slots][..., None] * sizes.ratio + np.arange(sizes.ratio)).reshape(len(first), -1)
        found.append(
            Evicted(row[first], finder(*mine, own), column[slots], finder(*mine, tokens), segment[first])
        )  # fmt: skip
    return tuple(found)


def _changes(*fields: Array) -> Bool[np.ndarray, " n"]:
    """Where a run of equal fields begins."""
    made = np.ones(len(fields[0]), bool)
    made[1:] = np.any([field[1:] != field[:-1] for field in fields], axis=0)
    return made


def pieces_of(keys: Layout, slots: Layout, queries: int, sizes: Sizes, *, together: bool = False) -> PiecePlan:
    """The last `queries` columns of the keys as queries; what they see stands in a table of the slots, then the keys.

    Made once for the same of all.

    Args:
        together: whether pieces of different sizes run together, filled up: fewer operators, for a device that waits
            for the host more than it computes.
    """
    key = ("pieces", id(slots), queries, sizes, together)
    return keys.plan(key, lambda: (_pieces(keys, slots, queries, sizes, together), slots))[0]


def _pieces(keys: Layout, slots: Layout, queries: int, sizes: Sizes, together: bool) -> PiecePlan:
    host, device = keys.host, keys.valid.device
    N, table = host.valid.shape[1], host.valid.shape[1] + slots.host.valid.shape[1]
    found = list(sized(keys, slots, queries, sizes, together=together))
    groups = tuple(
        _group(each, queries, table, slots.host.valid.shape[1], together, len(host.valid) * queries, device)
        for each in found
    )
    whole = bool(groups) and bool(host.valid[:, N - queries :].all())
    return PiecePlan(groups, max((int(each.seen.max()) for each in found), default=1), whole, together)


class Sized(NamedTuple):
    """Pieces that run together, n of them, filled up to R queries and W columns; the last ones stand in the last.

    Fields:
        row: [n, 1].
        asked: [n, R], columns among the queries; negative where there is none.
        columns: [n, W], columns of the table of slots and keys that the last query sees; negative where there is none.
        seen: [n, 1], how many of these there are, the last ones.
        own: [n, 1], how many of these are of the queries' own segment.
    """

    row: Int[np.ndarray, "n 1"]
    asked: Int[np.ndarray, "n R"]
    columns: Int[np.ndarray, "n W"]
    seen: Int[np.ndarray, "n 1"]
    own: Int[np.ndarray, "n 1"]


def sized(keys: Layout, slots: Layout, queries: int, sizes: Sizes, *, together: bool) -> Iterator[Sized]:
    """The pieces of `pieces_of`."""
    host, compressed = keys.host, slots.host
    N, G, S = host.valid.shape[1], compressed.valid.shape[1], sizes.segment
    documents = np.union1d(np.union1d(host.document, compressed.document), [0])
    tokens, summaries = Finder(host, documents), Finder(compressed, documents)
    row, query = host.valid[:, N - queries :].nonzero()
    column = query + N - queries
    document, position = host.document[row, column], host.position[row, column]
    starts = np.flatnonzero(_changes(row, document, position // S)) if len(row) else row
    ends = np.append(starts[1:], len(row))[: len(starts)] - 1
    row, document, low, high = row[starts], document[starts], position[starts], position[ends]
    segment = low // S
    memory = sizes.memory_from(segment)
    seen = (memory // sizes.ratio).clip(max=sizes.slots)
    # queries, keys among the tokens, compressed ones, keys of the own segment
    shapes = np.stack([high - low + 1, high + 1 - memory, seen, high + 1 - segment * S], 1)
    for alike in _alike(shapes, together):
        mine, here = (row[alike][:, None], document[alike][:, None]), shapes[alike]
        (asks, width, count, own), last = here.T[..., None], high[alike][:, None]
        R, W = int(asks.max()), int((width + count).max())
        back = np.arange(R)[::-1]  # how far before the last one
        asked = tokens(*mine, np.where(back < asks, last - back, -1)) - (N - queries)
        back = np.arange(W)[::-1]
        group = memory[alike][:, None] // sizes.ratio - 1 - (back - width)
        token = tokens(*mine, np.where(back < width, last - back, -1))
        before = summaries(*mine, np.where((back >= width) & (back < width + count), group, -1))
        yield Sized(mine[0], asked, np.where(token < 0, before, token + G), width + count, own)


def _alike(shapes: Int[np.ndarray, "n 4"], together: bool) -> list[Array]:
    """Which pieces run together: those of the same shape; or all; or those of like sizes, where all fill up much."""
    if not len(shapes):
        return []
    classes = shapes
    if together:
        large = np.stack([shapes[:, 0], shapes[:, 1] + shapes[:, 2]], 1)
        filled = len(large) * large.max(0).prod()
        wasteful = filled > max(FEW_SCORES, FILLED * large.prod(1).sum())
        classes = np.ceil(np.log2(large)).astype(np.int64) if wasteful else np.zeros_like(large)
    _, which = np.unique(classes, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [which == n for n in range(which.max() + 1)]


def _group(
    found: Sized, queries: int, table: int, slots: int, together: bool, every: int, device: torch.device
) -> Pieces:
    row, asked, columns, _, own = found
    here, there = asked >= 0, columns >= 0
    apart = -2 - 2 * np.arange(columns.shape[1])  # what is not there goes on with nothing
    first = row * table + slots  # the tokens' first: slots may stand elsewhere
    runs = () if together else tuple(map(_runs, np.where(there, columns + row * table, apart), first))
    follow = not together and bool((here & (asked - asked[:, :1] == np.arange(asked.shape[1]))).all())
    far = ~there[:, -int(own.max()) :] | (np.arange(int(own.max()))[::-1] >= own)
    rows = asked + row * queries
    return Pieces(
        tuple(rows[:, 0].tolist()) if follow else None,
        tensor_of(rows.clip(min=0), device),
        None if bool(here.all()) else tensor_of(~here[..., None], device),
        tensor_of(np.where(here, rows, every), device),
        tensor_of(np.where(there, columns + row * table, 0), device),
        None if bool(there.all()) else tensor_of(~there[:, None], device),
        runs if runs and max(map(len, runs)) <= FEW_RUNS else None,
        far.shape[1],
        tensor_of(far[..., None, None], device) if bool(far.any()) else None,
    )


def _runs(keys: Array, border: Array) -> tuple[Run, ...]:
    """Of one piece, none across the border; negative where there is no key."""
    starts = np.flatnonzero(np.append(True, (np.diff(keys) != 1) | (keys[1:] == border)))
    stops = np.append(starts[1:], len(keys))
    return tuple((int(keys[a]), int(a), int(b - a)) for a, b in zip(starts, stops) if keys[a] >= 0)


def few_of(keys: Layout, slots: Layout, queries: int, sizes: Sizes) -> Few:
    """Of a few queries: which of the slots and keys each does not see, and how far apart they count."""

    def find() -> tuple[Few, Layout]:
        host, compressed = keys.host, slots.host
        new = host.cut(slice(host.valid.shape[1] - queries, None))
        at = new.position[..., None]
        memory = sizes.memory_from(at // sizes.segment)
        seen = host.valid[:, None] & (host.document[:, None] == new.document[..., None])
        seen &= (host.position[:, None] >= memory) & (host.position[:, None] <= at)
        group = compressed.position[:, None]
        end = memory // sizes.ratio
        before = compressed.valid[:, None] & (compressed.document[:, None] == new.document[..., None])
        before &= (group < end) & (group >= end - sizes.slots)
        distance = np.concatenate([at - memory + end - group, at - host.position[:, None]], -1)
        seen = np.concatenate([before, seen], -1) & new.valid[..., None]
        distance = np.where(seen, distance, 0)
        device = keys.valid.device
        hidden = None if bool(seen.all()) else tensor_of(~seen[:, None], device)
        return Few(hidden, tensor_of(distance[:, None], device), int(distance.max(initial=0)) + 1), slots

    return keys.plan(("few", id(slots), queries, sizes), find)[0]
