"""State of a running model, and what can be done to any state: pick rows, cut the graph, count bytes.

States are NamedTuples, tuples, lists and dicts of batch-first tensors, so these functions know no mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.contract import Tokens
from attention_zoo.ops.columns import Columns

State = TypeVar("State")


class Running(NamedTuple):
    """A model between two calls. Its clock: where each row stands in which document.

    Fields:
        layers: the stack's state, a tree like its modules: a wrapper's holds that of what stands inside.
        next: [B], position of the next token in the row's current document; 0: no document is open.
        document: [B], number of the current document, as the layers count.
        offset: [B], added to the caller's document numbers: it rises when a row starts fresh.
    """

    layers: Any
    next: Int[Tensor, " B"]
    document: Int[Tensor, " B"]
    offset: Int[Tensor, " B"]

    @staticmethod
    def start(layers: Any, batch_size: int, device: Any) -> Running:
        zero = torch.zeros(batch_size, dtype=torch.long, device=device)
        return Running(layers, zero, zero, zero)

    def place(
        self, valid: Bool[Tensor, "B L"], tokens: Tokens | None, fresh: Bool[Tensor, " B"] | None
    ) -> tuple[Tokens, Running]:
        """Number the tokens of the next call, and turn the clock.

        Args:
            valid: True keeps a token.
            tokens: of the caller: is_global and document are read. Document numbers count over the whole stream: the
                one that the last call ended with goes on, a higher one is new. None: the current document goes on.
            fresh: rows that start a new stream. They get the next document number, so that nothing crosses; their
                caller's numbering may start anew.

        Returns:
            the tokens for the layers, and this state with its clock after them (layers unchanged).

        Raises:
            ValueError: where a row's document number is lower than in the last call and the row is not fresh.
        """
        current, start, offset = self.document, self.next, self.offset
        column = torch.where(valid, torch.arange(valid.shape[1], 0, -1, device=valid.device), 0).argmax(1, keepdim=True)
        first = current - offset if tokens is None else tokens.document.gather(1, column)[:, 0]
        if fresh is not None:
            current = torch.where(fresh & (start > 0), current + 1, current)
            start = torch.where(fresh, 0, start)
            offset = torch.where(fresh, current - first, offset)
        occupied = valid.any(1)
        if tokens is None:
            placed = Tokens.of(valid, start=start)._replace(document=current[:, None].expand_as(valid))
            return placed, self._replace(next=start + valid.sum(1), document=current, offset=offset)
        document = tokens.document + offset[:, None]
        if bool((fallen := occupied & (first + offset < current)).any()):
            row = int(fallen.long().argmax())
            raise ValueError(
                f"document must not fall from one call to the next, got {int(first[row])} after "
                f"{int((current - offset)[row])} in row {row}; number documents over the stream, or say fresh"
            )
        start = torch.where(occupied & (first + offset > current), 0, start)
        placed = Tokens.of(valid, tokens.is_global, torch.where(valid, document, 0), start)
        last = torch.where(valid, document, 0).amax(1)
        return placed, self._replace(
            next=torch.where(occupied, placed.next_position, start),
            document=torch.where(occupied, last, current),
            offset=offset,
        )


def reorder(state: State, index: Int[Tensor, " n"]) -> State:
    """Rows `index` of a state, in that order: for beams, and to drop rows that have ended."""
    return _map(lambda tensor: tensor.index_select(0, index), state)


def detach(state: State) -> State:
    """The same state without its graph: gradients of the next call end here."""
    return _map(torch.Tensor.detach, state)


def reserve(state: State, columns: int) -> State:
    """The same state; what grows with the context makes room for so many columns when it is next moved."""
    return _map(lambda held: held._replace(reserve=columns), state, Columns)


def state_bytes(state: Any) -> int:
    """Bytes that a state keeps alive: whole storages, each once, since a small view of a large one is not small."""
    storages = [tensor.untyped_storage() for tensor in _tensors(state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _map(function: Callable[[Any], Any], tree: Any, kind: type = Tensor) -> Any:
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, tuple | list):
        parts = [_map(function, part, kind) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, dict):
        return {key: _map(function, part, kind) for key, part in tree.items()}
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)
