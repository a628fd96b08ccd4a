"""Which tokens a running model still holds, kept once for all layers that forget alike; and the columns beside it.

A layer's state are `Columns`: tensors with room for more, and a `Ledger` of what each column is. Layers that were given
the same calls hold the same ledger object, so that a step is entered, checked and forgotten once for all of them.

A call without gradients writes its columns behind those held, in place. When a buffer is full, what no later token
sees is forgotten and the rest moves to a new one, a quarter larger than it needs to be (or as large as `reserve` says):
a few columns copied per token, amortised, and never a concatenation of all that was.

Columns that are held never change, so an older state stays right after its successor was made: it goes on in a buffer
of its own, since a buffer knows how many of its columns are written (`written`), by whichever state. Whatever makes
other tensors of a state (rows in another order, a file, a graph that is cut) makes them without that mark, so that
nobody writes behind their columns; copies that share a buffer among themselves share the mark.

With gradients nothing is written in place: columns are concatenated, and forgotten after each call.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import Host, tensor_of
from attention_zoo.layout.layout import Layout

MOVED = 16
"""A call may move this many columns for each one that it brings, to close holes."""


class Horizon(NamedTuple):
    """What a later token may still see: those of its document since a position, or all of them.

    Fields:
        span: how many positions before the next token's the oldest stands; None: all.
        segment: positions are counted from the start of the next token's segment of this many; 1: from itself.
        first: so many tokens at the start of the document are never forgotten. Nor are global ones.
        most: how many columns of a row can be live at once; None: any number.
    """

    span: int | None = None
    segment: int = 1
    first: int = 0
    most: int | None = None

    def live(self, held: Host) -> Bool[np.ndarray, "B S"]:
        """What the next token of each row's current document can still see."""
        mask = held.valid & (held.document == held.last_document)
        if self.span is None:
            return mask
        following = held.next_position[:, None]
        oldest = following - following % self.segment - self.span
        seen = (held.position >= oldest) | held.is_global
        return mask & (seen | (held.position < self.first) if self.first else seen)


class Ledger(NamedTuple):
    """What some columns of each row are, and the room behind them.

    Fields:
        fields: what each column is, [B, room], of which the first `filled` are held.
        filled: columns held.
        own: whether the fields are its own, to be written behind what is held; else they are somebody's, as they came.
        loose: columns that came since there was one that did not simply go on (padding, another document).
        steady: whether each row holds consecutive tokens of one document, the last in the last column.
        reserve: columns for which there shall be room at least.
    """

    fields: Layout
    filled: int
    own: bool = False
    loose: int = 0
    steady: bool = False
    reserve: int = 0

    @staticmethod
    def of(layout: Layout, reserve: int = 0) -> Ledger:
        """These columns as they are."""
        return Ledger(layout, layout.valid.shape[1], reserve=reserve)

    @property
    def layout(self) -> Layout:
        """What the columns held are, views; one object as long as nothing comes."""
        known = self.fields.__dict__.get("_view")
        if known is None or known[0] != self.filled:
            # the last alone: each would keep what is planned for it
            known = self.fields.__dict__["_view"] = self.filled, self._view()
        return known[1]

    def _view(self) -> Layout:
        if not self.own and self.filled == self.room:
            return self.fields
        held = slice(0, self.filled)
        return Layout(*self.fields.cut(held))._with(self.host)

    @property
    def host(self) -> Host:
        return self.fields.host.cut(slice(0, self.filled))

    @property
    def room(self) -> int:
        return self.fields.valid.shape[1]

    @property
    def writable(self) -> bool:
        """Whether the room behind the columns is its own, and still free."""
        return self.own and written(self.fields.valid) == self.filled


class Step(NamedTuple):
    """What became of a ledger, for the tensors beside it to follow.

    Fields:
        ledger: as it is now.
        chosen: [B, n], which of the columns held before are kept; None: all, where they stood.
        moved: whether the fields are new ones: then so are the tensors' buffers.
    """

    ledger: Ledger
    chosen: Int[Tensor, "B n"] | None = None
    moved: bool = False


def append(ledger: Ledger, layout: Layout, horizon: Horizon) -> tuple[Step, Ledger]:
    """Make room for a call's columns, then enter them: what became of those held, and the ledger with all of them.

    The same objects give the same objects: that is how layers share a ledger.
    """
    key: Hashable = ("append", id(ledger.fields), ledger.filled, ledger.own, horizon, in_place())
    # the key's id stays its own: the plan keeps the ledger
    return layout.plan(key, lambda: (*_append(ledger, layout, horizon), ledger))[:2]


def settle(ledger: Ledger, layout: Layout, horizon: Horizon) -> Step:
    """What is kept after the call that brought these columns last."""
    key: Hashable = ("settle", id(ledger.fields), ledger.filled, ledger.own, horizon, in_place())
    return layout.plan(key, lambda: (_settle(ledger, layout.valid.shape[1], horizon), ledger))[0]


def _append(ledger: Ledger, layout: Layout, horizon: Horizon) -> tuple[Step, Ledger]:
    added, most = layout.valid.shape[1], horizon.most
    if not ledger.filled:
        return Step(ledger), Ledger.of(layout, ledger.reserve)
    if not in_place() or (most is not None and added > slack(most)):
        return Step(ledger), Ledger.of(behind(ledger.layout, layout), ledger.reserve)
    fits = ledger.writable and ledger.filled + added <= ledger.room
    step = Step(ledger) if fits else _moved(ledger, horizon, added)
    into = step.ledger
    if not into.filled:  # nothing that a later token sees
        return step, Ledger.of(layout, ledger.reserve)
    plain = goes_on(into, layout)
    loose = into.loose + added if into.loose or not plain else 0
    if loose and plain:
        loose = into.filled + added  # tokens go on behind holes, as steps of decoding do: worth closing them now
    filled = into.filled + added
    host = into.fields.host
    for here, more in zip(host, layout.host):
        here[:, into.filled : filled] = more
    if host.valid.ctypes.data != into.fields.valid.data_ptr():  # on the CPU they are the same memory
        for field, news in zip(into.fields, layout):
            field.narrow(1, into.filled, added).copy_(news)
    set_written(into.fields.valid, filled)
    return step, into._replace(filled=filled, loose=loose, steady=into.steady and not loose)


def _settle(ledger: Ledger, added: int, horizon: Horizon) -> Step:
    if not in_place():
        columns, kept = chosen(ledger.host, horizon.live(ledger.host))
        if columns is None:
            return Step(Ledger.of(ledger.layout, ledger.reserve))
        device = ledger.fields.valid.device
        return Step(Ledger.of(Layout.known(kept, device), ledger.reserve), tensor_of(columns, device))
    many = horizon.most is not None and added > slack(horizon.most)
    holes = ledger.loose > 0 and ledger.loose * MOVED >= ledger.filled
    return _moved(ledger, horizon, 0) if not ledger.own or many or holes else Step(ledger)


def chosen(held: Host, mask: Bool[np.ndarray, "B S"]) -> tuple[Int[np.ndarray, "B n"] | None, Host]:
    """The masked columns, in order, pushed to the right, and what they are; None: all of them."""
    if bool(mask.all()):
        return None, held
    count = int(mask.sum(1).max(initial=0))
    columns = np.argsort(mask, axis=1, kind="stable")[:, mask.shape[1] - count :]
    return columns, held.take(columns).only(np.take_along_axis(mask, columns, 1))


def _moved(ledger: Ledger, horizon: Horizon, added: int) -> Step:
    """The live columns in new fields, with room for `added` more and some."""
    columns, kept = chosen(ledger.host, horizon.live(ledger.host))
    count, most = kept.valid.shape[1], horizon.most
    usual = count if most is None else max(count, min(most, 4 * count + 1024))
    room = max(usual + max(slack(usual), added), ledger.reserve if most is None else 0)
    host = Host(*(np.zeros((len(field), room), field.dtype) for field in kept))
    for here, field in zip(host, kept):
        here[:, :count] = field
    device = ledger.fields.valid.device
    fields = Layout.known(host, device)
    steady = is_steady(kept)
    set_written(fields.valid, count)
    made = Ledger(fields, count, True, 0, steady, ledger.reserve)
    return Step(made, None if columns is None else tensor_of(columns, device), moved=True)


def behind(held: Layout, new: Layout) -> Layout:
    """Keys: those held, then a call's own."""
    made = Layout(*(torch.cat(pair, 1) for pair in zip(held, new)))
    return made._with(held.host.then(new.host))


def goes_on(ledger: Ledger, layout: Layout) -> bool:
    """Whether these are the next tokens of each row's current document, without padding."""
    held, new, last = ledger.fields.host, layout.host, ledger.filled - 1
    step = new.position - held.position[:, last : last + 1]
    plain = new.valid & held.valid[:, last : last + 1] & (new.document == held.document[:, last : last + 1])
    return bool((plain & (step == np.arange(1, step.shape[1] + 1))).all())


def is_steady(held: Host) -> bool:
    """Whether each row's valid columns are its last, consecutive and of one document."""
    columns = held.valid.shape[1]
    if not columns:
        return False
    column = np.arange(columns)
    follows = (held.position - column == held.position[:, -1:] - column[-1]) & held.valid
    follows = follows & (held.document == held.document[:, -1:])
    # once broken on the way back from the end, nothing valid may come
    broken = np.maximum.accumulate(~follows[:, ::-1], 1)[:, ::-1]
    return bool((held.valid[:, -1] & ~(broken & held.valid).any(1)).all())


def written(buffer: Tensor) -> int:
    """How many of its columns are written; -1 where nobody knows."""
    known: int = getattr(buffer, "_columns_written", -1)
    return known


def set_written(buffer: Tensor, columns: int) -> None:
    """Say it, on the tensor itself: states that share it ask the same one."""
    buffer._columns_written = columns  # type: ignore[attr-defined]


def in_place() -> bool:
    """Whether a call may write behind the columns that it was given."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def slack(count: int) -> int:
    """Room for so many more columns."""
    return max(32, count // 4)


def gathered(x: Tensor, columns: Int[Tensor, "B n"]) -> Tensor:
    """Each row its own columns of [B, ..., S, D]."""
    index = columns.view(columns.shape[0], *[1] * (x.ndim - 3), columns.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], columns.shape[1], x.shape[-1]))


class Columns(NamedTuple):
    """What a layer holds of some columns of each row.

    Fields:
        buffers: each [B, ..., room, D], of which the first `ledger.filled` columns are held.
        ledger: what each column is.
    """

    buffers: tuple[Tensor, ...]
    ledger: Ledger

    @staticmethod
    def of(ledger: Ledger | Layout, *tensors: Tensor) -> Columns:
        """These columns as they are, each tensor [B, ..., S, D]."""
        return Columns(tensors, Ledger.of(ledger) if isinstance(ledger, Layout) else ledger)

    @property
    def filled(self) -> int:
        return self.ledger.filled

    @property
    def holds(self) -> tuple[int, ...]:
        """The shape of the first buffer without its columns: [B, ..., D]."""
        shape = self.buffers[0].shape
        return *shape[:-2], shape[-1]

    @property
    def held(self) -> tuple[Tensor, ...]:
        """[B, ..., filled, D], views, or the buffers themselves where they are full."""
        if all(buffer.shape[-2] == self.filled for buffer in self.buffers):
            return self.buffers
        return tuple(buffer.narrow(-2, 0, self.filled) for buffer in self.buffers)

    @property
    def tokens(self) -> Layout:
        """What the columns held are."""
        return self.ledger.layout

    def append(self, layout: Layout, *tensors: Tensor, horizon: Horizon) -> Columns:
        """These columns, followed by those of a call, each tensor [B, ..., n, D]."""
        step, ledger = append(self.ledger, layout, horizon)
        added = layout.valid.shape[1]
        if not ledger.own:
            kept = self._follow(step).held if step.ledger.filled else ()
            return Columns(tuple(torch.cat(pair, -2) for pair in zip(kept, tensors)) if kept else tensors, ledger)
        into = self._follow(step, tensors)
        if not step.moved and not into._may_write(added, tensors):
            into = into._copied(ledger.room, tensors)
        for buffer, new in zip(into.buffers, tensors):
            buffer.narrow(-2, step.ledger.filled, added).copy_(new)
        set_written(into.buffers[0], ledger.filled)
        return Columns(into.buffers, ledger)

    def settle(self, layout: Layout, *, horizon: Horizon) -> tuple[Columns, Columns]:
        """What is kept after the call that brought these columns last, and what it was taken from.

        The second still holds what the first has forgotten: what a compressed memory is made of.
        """
        return self._follow(settle(self.ledger, layout, horizon), self.buffers), self

    def _follow(self, step: Step, like: tuple[Tensor, ...] = ()) -> Columns:
        """The tensors of what became of the ledger, in new buffers if it moved: of a dtype that holds `like`, too."""
        if step.ledger is self.ledger:
            return self
        tensors = self.held if step.chosen is None else tuple(gathered(x, step.chosen) for x in self.held)
        made = Columns(tensors, step.ledger)
        return made._copied(step.ledger.room, like or tensors) if step.moved else made

    def _may_write(self, added: int, tensors: tuple[Tensor, ...]) -> bool:
        alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(self.buffers, tensors))
        first = self.buffers[0]
        return alike and first.shape[-2] >= self.filled + added and written(first) == self.filled

    def _copied(self, room: int, like: tuple[Tensor, ...]) -> Columns:
        """In buffers of its own with so much room, which holds anything: to fill it took as long as a short prompt."""
        with torch.inference_mode(False):
            buffers = tuple(
                x.new_empty(*x.shape[:-2], room, x.shape[-1], dtype=torch.promote_types(x.dtype, y.dtype))
                for x, y in zip(self.buffers, like)
            )
        for buffer, x in zip(buffers, self.held):
            buffer.narrow(-2, 0, self.filled).copy_(x)
        set_written(buffers[0], self.filled)
        return Columns(buffers, self.ledger)


def none(batch: int, device: Any) -> Ledger:
    """No columns at all: what an empty state holds."""
    return Ledger.of(Layout.plain(batch, 0, device))
