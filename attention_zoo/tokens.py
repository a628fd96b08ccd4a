"""What each column of a call is besides its vector: position, padding, document; how they are cut, joined, forgotten.

Letters: B batch, L columns of a call, S columns that are held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attention_zoo.rules import at_least, shown

LAST = 2**53
"""The last position that a token may have: what a float64 still counts."""


class Tokens(NamedTuple):
    """What each column is, besides its vector. Every field is [B, L]; build it with `Tokens.of`.

    Fields:
        position: place within the token's own document; strictly increases over its valid columns. Anything at padding.
        valid: False at padding, on either side or in holes.
        is_global: sees and is seen by every token of its document (still causal where the layer is).
        document: attention, memory and recurrent state never cross documents (packing). Never falls along a row.
        length: number of tokens of the token's document up to the end of the call. Only two-sided patterns may read it,
            since a causal token must not know what follows.
    """

    position: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    is_global: Bool[Tensor, "B L"]
    document: Int[Tensor, "B L"]
    length: Int[Tensor, "B L"]

    @staticmethod
    def of(valid: Tensor, is_global: Tensor | None = None, document: Tensor | None = None, start: Any = 0) -> Tokens:
        """Number the valid tokens of each document from 0; those of a row's first document from `start`.

        Args:
            valid: bool [B, L], True keeps a token.
            is_global: bool [B, L]; default none.
            document: non-negative int [B, L] that never falls along the valid tokens of a row; default one document.
            start: int or int [B], position of the first valid token: what earlier calls have already consumed.
                From 0 on; a tensor that is not on the CPU is not read, and positions below 0 are 0 there.

        Raises:
            ValueError: for a wrong shape or dtype, naming the argument.
        """
        if not isinstance(valid, Tensor) or valid.ndim != 2 or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be a bool tensor [batch, length] where True keeps a token, got {of_tensor(valid)}"
            )
        B, L = valid.shape
        device = valid.device
        for name, given, kind in (("is_global", is_global, torch.bool), ("document", document, None)):
            if given is None:
                continue
            if not isinstance(given, Tensor):
                raise ValueError(f"{name} must be a tensor with the shape of valid, {(B, L)}, got {shown(given)}")
            if given.shape != valid.shape:
                raise ValueError(f"{name} must have the shape of valid, {(B, L)}, got {tuple(given.shape)}")
            if given.dtype.is_floating_point or given.dtype.is_complex or (kind is not None and given.dtype != kind):
                raise ValueError(f"{name} must be {'bool' if kind else 'integer'}, got {given.dtype}")
            if given.device != device:
                raise ValueError(f"{name} must be where valid is, on {device}, got {given.device}")
        begin = _begin(start, B, device)[:, None]
        flags = torch.zeros_like(valid) if is_global is None else is_global & valid
        count = valid.long().cumsum(1)
        if document is None:
            position = (begin + count - 1).clamp(min=0)
            length = (begin + count[:, -1:]).expand(B, L) if L else position
            return Tokens(position, valid, flags, torch.zeros_like(position), length)
        filled = torch.where(valid, document.long(), -1)
        running = filled.cummax(1).values if L else filled
        if bool((valid & ((document.long() < running) | (document < 0))).any()):
            raise ValueError("document must be non-negative and never fall along the valid tokens of a row")
        before = nn.functional.pad(running[:, :-1], (1, 0), value=-1)
        first = valid & (running != before)
        base = torch.where(first, count - 1, 0).cummax(1).values if L else count
        index = (first.long().cumsum(1) - 1).clamp(min=0)
        shift = torch.where(index == 0, begin, 0)
        position = (count - 1 - base + shift).clamp(min=0)
        totals = torch.zeros_like(count).scatter_add_(1, index, valid.long())
        return Tokens(position, valid, flags, running.clamp(min=0), totals.gather(1, index) + shift)

    @staticmethod
    def all_valid(batch: int, length: int, device: Any = None) -> Tokens:
        """One document of `length` valid tokens from position 0 in each of `batch` rows."""
        at_least(0, batch=batch, length=length)
        return Tokens.of(torch.ones(batch, length, dtype=torch.bool, device=device))

    @staticmethod
    def none(batch: int, device: Any = None) -> Tokens:
        """No columns at all: what an empty cache holds."""
        return Tokens.of(torch.ones(batch, 0, dtype=torch.bool, device=device))

    @property
    def next_position(self) -> Int[Tensor, " B"]:
        """[B], the position that would follow the last valid token; 0 for a row that has none."""
        after = torch.where(self.valid, self.position + 1, 0)
        if not after.shape[1]:
            return after.sum(1)
        column = torch.where(self.valid, torch.arange(after.shape[1], device=after.device), 0).amax(1, keepdim=True)
        return after.gather(1, column)[:, 0]

    def cut(self, columns: slice | Tensor, rows: slice = slice(None)) -> Tokens:
        """The same columns of these rows, by default of all."""
        return Tokens(*(field[rows, columns] for field in self))

    def take(self, columns: Int[Tensor, "B n"]) -> Tokens:
        """Each row its own columns."""
        return Tokens(*(field.gather(1, columns) for field in self))

    def then(self, later: Tokens) -> Tokens:
        """These columns, followed by later ones."""
        return Tokens(*(torch.cat([a, b], 1) for a, b in zip(self, later)))


def _begin(start: Any, batch: int, device: Any) -> Int[Tensor, " B"]:
    """The position that each row starts from. Values are read on CPU alone: elsewhere each step would wait."""
    if isinstance(start, Tensor) and (not is_integers(start) or start.shape not in ((), (1,), (batch,))):
        raise ValueError(f"start must be an integer, or a tensor of {batch} integers, got {of_tensor(start)}")
    here = type(start) is Tensor and start.device.type == "cpu" and not torch.compiler.is_compiling()
    if here or not isinstance(start, Tensor):
        given = start.tolist() if here else start  # dispatches no operator
        rows = given if isinstance(given, list | tuple) else [given]
        if len(rows) not in (1, batch) or not all(type(row) is int and 0 <= row <= LAST for row in rows):
            raise ValueError(
                f"start must be an integer from 0 to {LAST}, or one for each of {batch} rows, got {shown(given)}"
            )
    return torch.as_tensor(start, device=device, dtype=torch.long).expand(batch)


def is_integers(given: Any) -> bool:
    """Whether this is a tensor of whole numbers."""
    if not isinstance(given, Tensor):
        return False
    return not (given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool)


def of_tensor(given: Any) -> str:
    """What is said of an argument that is no tensor of the right kind."""
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else shown(given)


def keep(mask: Bool[Tensor, "B S"], tokens: Tokens, *tensors: Tensor) -> tuple[Any, ...]:
    """Forget all columns but the masked ones: the one forgetting function of every cache and memory.

    Order is preserved, rows are pushed to the right and fillers (valid False) stand on the left.

    Args:
        mask: bool [B, S].
        tokens: of the S columns.
        tensors: each [B, ..., S, D].

    Returns:
        tokens and tensors with as many columns as the fullest row keeps.
    """
    if bool(mask.all()):
        return tokens, *tensors
    order = torch.argsort(mask.long(), dim=1, stable=True)
    count = int(mask.sum(1).max())
    columns = order[:, order.shape[1] - count :]
    kept = mask.gather(1, columns)
    chosen = tokens.take(columns)
    chosen = chosen._replace(valid=chosen.valid & kept, is_global=chosen.is_global & kept)

    def rows(x: Tensor) -> Tensor:
        index = columns.view(columns.shape[0], *[1] * (x.ndim - 3), count, 1)
        return x.gather(-2, index.expand(*x.shape[:-2], count, x.shape[-1]))

    return chosen, *(rows(x) for x in tensors)


def check_tokens(tokens: Any, shape: torch.Size) -> None:
    """Raise a ValueError unless these are `Tokens` of that [batch, length]."""
    if not isinstance(tokens, Tokens):
        given = f"a tensor of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be made by Tokens.of(valid) from a bool mask [batch, length], got {given}")
    if tokens.valid.shape != shape:
        raise ValueError(f"tokens must be of shape {tuple(shape)} like the input, got {tuple(tokens.valid.shape)}")
    if tokens.valid.dtype != torch.bool:
        raise ValueError(f"tokens must be made by Tokens.of(valid): valid must be bool, got {tokens.valid.dtype}")


def check_place(tokens: Tokens, like: Tensor) -> None:
    """Raise a ValueError unless the tokens are on the device of their vectors."""
    if tokens.valid.device != like.device:
        raise ValueError(f"tokens must be where the input is, on {like.device}, got {tokens.valid.device}")
