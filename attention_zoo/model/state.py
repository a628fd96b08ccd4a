"""State of a running model, and what can be done to any state: pick rows, cut the graph, count bytes.

States are NamedTuples, tuples, lists and dicts of batch-first tensors, so these functions know no mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Ledger
from attention_zoo.layout.number import numbered

State = TypeVar("State")


class Clock(NamedTuple):
    """Where each row stands in which document, each [B]; see `Running`."""

    next: Array
    document: Array
    offset: Array


class _Running(NamedTuple):
    layers: Any
    next: Int[Tensor, " B"]
    document: Int[Tensor, " B"]
    offset: Int[Tensor, " B"]


class Running(_Running):
    """A model between two calls. Its clock: where each row stands in which document.

    What the host knows of the clock is kept beside the fields; a state that is made of other tensors (`reorder`, a
    checkpoint) reads it again.

    Fields:
        layers: the stack's state, a tree like its modules: a wrapper's holds that of what stands inside.
        next: [B], position of the next token in the row's current document; 0: no document is open.
        document: [B], number of the current document, as the layers count.
        offset: [B], added to the caller's document numbers: it rises when a row starts fresh.
    """

    @staticmethod
    def start(layers: Any, batch_size: int, device: Any) -> Running:
        zero = np.zeros(batch_size, np.int64)
        return Running._at(layers, Clock(zero, zero, zero), device)

    @staticmethod
    def _at(layers: Any, clock: Clock, device: Any, before: Running | None = None) -> Running:
        """At this time; tensors of what is no other than `before` are the same."""
        fields = [
            before[1 + n] if before is not None and now is before.clock[n] else tensor_of(now, device)
            for n, now in enumerate(clock)
        ]
        made = Running(layers, *fields)
        made.__dict__["clock"] = clock
        return made

    @property
    def clock(self) -> Clock:
        """On the host."""
        if "clock" not in self.__dict__:
            self.__dict__["clock"] = Clock(*torch.stack([*self[1:]]).numpy(force=True))
        known: Clock = self.__dict__["clock"]
        return known

    def after(self, layers: Any) -> Running:
        """The same clock, with what the layers hold now."""
        made = Running(layers, *self[1:])
        made.__dict__.update(self.__dict__)
        return made

    def place(
        self, shape: tuple[int, int], layout: Layout | None, fresh: Bool[Tensor, " B"] | None
    ) -> tuple[Layout, Running]:
        """Number the tokens of the next call, and turn the clock.

        Args:
            shape: [B, L] of the call.
            layout: of the caller: padding, is_global and document are read. Document numbers count over the whole
                stream: the one that the last call ended with goes on, a higher one is new. None: all tokens are valid
                and the current document goes on.
            fresh: rows that start a new stream. They get the next document number, so that nothing crosses; their
                caller's numbering may start anew.

        Returns:
            the tokens for the layers, and this state with its clock after them (layers unchanged).

        Raises:
            ValueError: where a row's document number is lower than in the last call and the row is not fresh.
        """
        start, current, offset = self.clock
        device, given = self.next.device, None if layout is None else layout.host
        valid = np.ones(shape, bool) if given is None else given.valid
        first = current - offset
        if given is not None:
            column = valid.argmax(1)[:, None] if shape[1] else np.zeros((len(valid), 1), np.int64)
            first = np.take_along_axis(given.document, column, 1)[:, 0]
        if fresh is not None:
            anew = fresh.numpy(force=True)
            current = np.where(anew & (start > 0), current + 1, current)
            start = np.where(anew, 0, start)
            offset = np.where(anew, current - first, offset)
        if given is None:
            after = start + shape[1]
            document, length = (np.broadcast_to(each[:, None], shape) for each in (current, after))
            placed = Host(start[:, None] + np.arange(shape[1]), valid, np.zeros(shape, bool), document, length)
            clock = Clock(after, current, offset)
            return Layout.known(placed, device), Running._at(self.layers, clock, device, self)
        occupied, document = valid.any(1), given.document + offset[:, None]
        if bool((fallen := occupied & (first + offset < current)).any()):
            row = int(fallen.argmax())
            raise ValueError(
                f"document must not fall from one call to the next, got {int(first[row])} after "
                f"{int((current - offset)[row])} in row {row}; number documents over the stream, or say fresh"
            )
        start = np.where(occupied & (first + offset > current), 0, start)
        document = np.where(valid, document, 0)
        placed = numbered(valid, given.is_global, document, start)
        clock = Clock(
            np.where(occupied, placed.next_position, start),
            np.where(occupied, document.max(1, initial=0), current),
            offset,
        )
        return Layout.known(placed, device), Running._at(self.layers, clock, device)


def reorder(state: State, index: Int[Tensor, " n"]) -> State:
    """Rows `index` of a state, in that order: for beams, and to drop rows that have ended."""
    return _map(lambda tensor: tensor.index_select(0, index), state)


def detach(state: State) -> State:
    """The same state without its graph: gradients of the next call end here."""
    return _map(torch.Tensor.detach, state)


def reserve(state: State, columns: int) -> State:
    """The same state; what grows with the context makes room for so many columns when it is next moved."""
    return _map(lambda ledger: ledger._replace(reserve=columns), state, Ledger)


def state_bytes(state: Any) -> int:
    """Bytes that a state keeps alive: whole storages, each once, since a small view of a large one is not small."""
    storages = [tensor.untyped_storage() for tensor in _tensors(state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _map(function: Callable[[Any], Any], tree: Any, kind: type = Tensor, known: dict[int, Any] | None = None) -> Any:
    """The tree with the function's results; what stood in it twice, as one object, does so again."""
    known = {} if known is None else known
    if id(tree) not in known:
        if isinstance(tree, kind):
            found = function(tree)
        elif isinstance(tree, tuple | list):
            parts = [_map(function, part, kind, known) for part in tree]
            found = type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
        elif isinstance(tree, dict):
            found = {key: _map(function, part, kind, known) for key, part in tree.items()}
        else:
            return tree
        known[id(tree)] = found
    return known[id(tree)]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)
