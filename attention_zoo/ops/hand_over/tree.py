"""A state as a list of tensors and a few integers that say how they hang together, and back. Nothing is pickled.

Both sides know what kind of tree it is: an empty state of the same layer is the pattern, by which named tuples get
their types. What the pattern cannot know (how many columns there are, which tensors learn, what is absent) the integers
say. Columns are sent as they are held, without the room behind them; what the host knows of them comes along, so that
nothing is read back from a device that was known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns
from attention_zoo.tokens import Tokens

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
NOTHING, TENSOR, WHOLE, FLAG, MANY, AGAIN, COLUMNS, TOKENS = range(8)


class Leaf(NamedTuple):
    """What is said of a tensor before it comes."""

    dtype: torch.dtype
    learns: bool
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


def flattened(tree: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors of a tree, each once, and the integers by which `grown` makes it again."""
    tensors: list[Tensor] = []
    codes: list[int] = []
    known: dict[int, int] = {}
    _flatten(tree, tensors, codes, known)
    return tensors, codes


def _flatten(tree: Any, tensors: list[Tensor], codes: list[int], known: dict[int, int]) -> None:
    if tree is None:
        codes.append(NOTHING)
    elif isinstance(tree, bool):
        codes.extend((FLAG, int(tree)))
    elif isinstance(tree, int):
        codes.extend((WHOLE, tree))
    elif isinstance(tree, Tensor):
        codes.extend((TENSOR, DTYPES.index(tree.dtype), int(tree.requires_grad), tree.ndim, *tree.shape))
        tensors.append(tree)
    elif not isinstance(tree, tuple | list | dict):
        raise TypeError(
            f"a state must be made of tensors, tuples, lists, dicts and integers, got {type(tree).__name__}"
        )
    elif id(tree) in known:  # layers share what they know of their tokens
        codes.extend((AGAIN, known[id(tree)]))
    else:
        known[id(tree)] = len(known)
        if isinstance(tree, Columns):
            layout = tree.tokens  # one object as long as nothing comes: shared by layers, whatever holds it
            codes.extend((COLUMNS, len(tree.buffers)))
            parts: Sequence[Any] = (layout, *tree.held)
        elif isinstance(tree, Tokens):
            codes.append(TOKENS)
            parts = tuple(tree)
        else:
            parts = list(tree.values()) if isinstance(tree, dict) else tree
            codes.extend((MANY, len(parts)))
        for part in parts:
            _flatten(part, tensors, codes, known)


def leaves(codes: Sequence[int]) -> list[Leaf]:
    """What tensors the integers speak of, in order."""
    found, at = [], 0
    while at < len(codes):
        code = codes[at]
        at += {NOTHING: 1, TOKENS: 1, TENSOR: 4}.get(code, 2)
        if code == TENSOR:
            dtype, learns, ndim = codes[at - 3 : at]
            found.append(Leaf(DTYPES[dtype], bool(learns), tuple(codes[at : at + ndim])))
            at += ndim
    return found


def grown(codes: Sequence[int], tensors: Sequence[Tensor], pattern: Any) -> Any:
    """The tree again, of these tensors.

    Args:
        pattern: an empty state of the same layer: it says which named tuples there are.

    Raises:
        RuntimeError: where the other side sent another tree.
    """
    return _grown(iter(codes), iter(tensors), pattern, {})


def _grown(codes: Iterator[int], tensors: Iterator[Tensor], pattern: Any, known: dict[int, Any]) -> Any:
    code = next(codes)
    if code == NOTHING:
        return None
    if code == FLAG:
        return bool(next(codes))
    if code == WHOLE:
        return next(codes)
    if code == TENSOR:
        _, _, ndim = (next(codes) for _ in range(3))
        for _ in range(ndim):
            next(codes)
        return next(tensors)
    if code == AGAIN:
        return known[next(codes)]
    number = len(known)
    known[number] = None
    if code == TOKENS:
        fields = [_grown(codes, tensors, None, known) for _ in range(len(Tokens._fields))]
        known[number] = Layout.fresh(Tokens(*fields))
    elif code == COLUMNS:
        count = next(codes)
        layout = _grown(codes, tensors, None, known)
        known[number] = Columns.of(layout, *(_grown(codes, tensors, None, known) for _ in range(count)))
    else:
        known[number] = _many(next(codes), codes, tensors, pattern, known)
    return known[number]


def _many(count: int, codes: Iterator[int], tensors: Iterator[Tensor], pattern: Any, known: dict[int, Any]) -> Any:
    if not isinstance(pattern, tuple | list | dict) or len(pattern) != count:
        raise RuntimeError(
            f"a state came whose tree is not that of this process: {count} parts where there should be "
            f"{len(pattern) if isinstance(pattern, tuple | list | dict) else type(pattern).__name__}; "
            f"all processes must run the same model"
        )
    inner = list(pattern.values()) if isinstance(pattern, dict) else pattern
    parts = [_grown(codes, tensors, each, known) for each in inner]
    if isinstance(pattern, dict):
        return dict(zip(pattern, parts))
    return type(pattern)(*parts) if hasattr(pattern, "_fields") else type(pattern)(parts)
