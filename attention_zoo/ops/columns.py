"""Columns that a running layer holds, in buffers with room for more: what caches and memories are made of.

A call without gradients writes its columns behind those held, in place. When a buffer is full, what no later token
sees is forgotten and the rest moves to a new one, a quarter larger than it needs to be (or as large as `reserve` says):
a few columns copied per token, amortised, and never a concatenation of all that was.

Columns that are held never change, so an older state stays right after its successor was made: it goes on in a buffer
of its own, since torch's version counter tells it that somebody has written behind its columns.

With gradients nothing is written in place: columns are concatenated, and forgotten after each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from attention_zoo.contract import Tokens, keep

MOVED = 16
"""A call may move this many columns for each one that it brings, to close holes."""
Live = Callable[[Tokens], Bool[Tensor, "B S"]]


class Columns(NamedTuple):
    """Some columns of each row, and the room behind them.

    Fields:
        buffers: each [B, ..., room, D], of which the first `filled` columns are held.
        fields: what each column is, [B, room].
        filled: columns held.
        version: of the buffers when this state was made; a buffer that has a later one was written by somebody else.
            -1: there are no buffers of its own.
        loose: columns that came since there was one that did not simply go on (padding, another document).
        steady: whether each row holds consecutive tokens of one document, the last in the last column.
        reserve: columns for which buffers have room at least.
    """

    buffers: tuple[Tensor, ...]
    fields: Tokens
    filled: int
    version: int = -1
    loose: int = 0
    steady: bool = False
    reserve: int = 0

    @staticmethod
    def of(tokens: Tokens, *tensors: Tensor, reserve: int = 0) -> Columns:
        """These columns as they are, each tensor [B, ..., S, D]."""
        return Columns(tensors, tokens, tokens.valid.shape[1], reserve=reserve)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """[B, ..., filled, D], views."""
        return tuple(buffer.narrow(-2, 0, self.filled) for buffer in self.buffers)

    @property
    def tokens(self) -> Tokens:
        """What the columns held are, views."""
        return type(self.fields)(*(field.narrow(1, 0, self.filled) for field in self.fields))

    @property
    def room(self) -> int:
        return self.fields.valid.shape[1]

    def append(self, tokens: Tokens, *tensors: Tensor, live: Live, most: int | None = None) -> Columns:
        """These columns, followed by later ones.

        Args:
            tokens, tensors: the later columns, each tensor [B, ..., n, D].
            live: which columns the token after the given ones may see; asked only when columns must move.
            most: how many columns of a row can be live at once; None: any number.
        """
        added = tokens.valid.shape[1]
        if self.filled and (not _in_place() or (most is not None and added > _slack(most))):
            joined = (torch.cat(pair, -2) for pair in zip(self.held, tensors))
            return Columns.of(self.tokens.then(tokens), *joined, reserve=self.reserve)
        into = self if not self.filled or self._may_write(added, tensors) else self._moved(live, most, added, tensors)
        if not into.filled:  # nothing came yet, or nothing that a later token sees
            return Columns.of(tokens, *tensors, reserve=self.reserve)
        loose = into.loose + added if into.loose or not into.goes_on(tokens) else 0
        for buffer, new in zip(into.buffers, tensors):
            buffer.narrow(-2, into.filled, added).copy_(new)
        for field, news in zip(into.fields, tokens):
            field.narrow(1, into.filled, added).copy_(news)
        version = into.fields.valid._version
        steady = into.steady and not loose
        return into._replace(filled=into.filled + added, version=version, loose=loose, steady=steady)

    def settle(self, added: int, *, live: Live, most: int | None = None) -> Columns:
        """What is kept after a call that brought `added` columns."""
        if not _in_place():
            tokens, *tensors = keep(live(self.tokens), self.tokens, *self.held)
            return Columns.of(tokens, *tensors, reserve=self.reserve)
        many = most is not None and added > _slack(most)
        holes = self.loose > 0 and self.loose * MOVED >= self.filled
        return self._moved(live, most, 0, self.buffers) if self.version < 0 or many or holes else self

    def goes_on(self, tokens: Tokens) -> bool:
        """Whether these are the next tokens of each row's current document, without padding."""
        last = slice(self.filled - 1, self.filled)
        fields = self.fields
        step = tokens.position - fields.position[:, last]
        if step.shape[1] > 1:
            step = step - torch.arange(step.shape[1], device=step.device)
        plain = tokens.valid & fields.valid[:, last] & (step == 1) & (tokens.document == fields.document[:, last])
        return bool(plain.all())

    def _may_write(self, added: int, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the room behind the columns is enough, and still free."""
        if self.version < 0 or self.filled + added > self.room or self.fields.valid.is_inference():
            return False
        alike = all(a.dtype == b.dtype and a.device == b.device for a, b in zip(self.buffers, tensors))
        return alike and self.fields.valid._version == self.version

    def _moved(self, live: Live, most: int | None, added: int, like: tuple[Tensor, ...]) -> Columns:
        """The live columns in new buffers, with room for `added` more and some."""
        tokens, *tensors = keep(live(self.tokens), self.tokens, *self.held)
        count = tokens.valid.shape[1]
        usual = count if most is None else max(count, min(most, 4 * count + 1024))
        room = max(usual + max(_slack(usual), added), self.reserve if most is None else 0)
        dtypes = [torch.promote_types(a.dtype, b.dtype) for a, b in zip(tensors, like)]
        # an inference tensor has no version
        with torch.inference_mode(False):
            buffers = tuple(
                torch.zeros(*x.shape[:-2], room, x.shape[-1], dtype=dtype, device=x.device)
                for x, dtype in zip(tensors, dtypes)
            )
            fields = Tokens(*(torch.zeros(len(x), room, dtype=x.dtype, device=x.device) for x in tokens))
        for buffer, x in zip(buffers, tensors):
            buffer.narrow(-2, 0, count).copy_(x)
        for field, news in zip(fields, tokens):
            field.narrow(1, 0, count).copy_(news)
        version = fields.valid._version
        return Columns(buffers, fields, count, version, 0, _is_steady(tokens), self.reserve)


def _in_place() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _slack(count: int) -> int:
    return max(32, count // 4)


def _is_steady(tokens: Tokens) -> bool:
    """Whether each row's valid columns are its last, consecutive and of one document."""
    if not tokens.valid.shape[1]:
        return False
    column = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)
    follows = (tokens.position - column == tokens.position[:, -1:] - column[-1]) & tokens.valid
    follows = follows & (tokens.document == tokens.document[:, -1:])
    # once broken on the way back from the end, nothing valid may come
    broken = (~follows).flip(1).cummax(1).values.flip(1)
    return bool((tokens.valid[:, -1] & ~(broken & tokens.valid).any(1)).all())
