"""`Layout`: the tokens of a call with all that is known of how they stand, found once for all layers.

A model makes one a call and hands it to its layers in the place of `Tokens`, which it is; a layer that is called by
itself makes its own. Facts are plain Python. They are read from the device at most once, all together, when the first
of them is asked for; of a call without tokens, or one that only goes on where a state ended, they are known before.
What layers plan from them (tiles, chunks, links) is kept here too (`plan`), so that a stack plans once.

Letters: B batch, L columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from attention_zoo.layout.host import Array, Host, array_of, before, host_tokens, tensor_of
from attention_zoo.tokens import Tokens

Found = TypeVar("Found")
Mark = Callable[[Tokens], Tokens]


class Layout(Tokens):
    """Tokens that nobody outside of this package writes to, and the facts about them. Made by the functions below.

    `_replace` gives plain `Tokens`: what comes in is somebody's, and the facts may be others.
    """

    # no __slots__: facts and plans are kept beside the fields

    @staticmethod
    def of(tokens: Tokens) -> Layout:  # type: ignore[override]
        """A copy of somebody's tokens: masks may be filled again before backward, or a later call, reads them."""
        if isinstance(tokens, Layout):
            return tokens
        position, valid, is_global, document, length = tokens
        whole = torch.stack([position, document, length, valid, is_global])  # bools become integers
        copied = whole[:3].unbind()
        made = Layout(copied[0], valid.clone(), is_global.clone(), copied[1], copied[2])
        made._whole = whole
        return made

    @staticmethod
    def fresh(tokens: Tokens) -> Layout:
        """Tokens made of tensors that nobody else has."""
        return Layout(*tokens)

    @staticmethod
    def known(host: Host, device: torch.device | str) -> Layout:
        """What the host knows already, there."""
        return Layout(*host.on(torch.device(device)))._with(host)

    @staticmethod
    def plain(batch: int, length: int, device: torch.device | str = "cpu", start: int = 0) -> Layout:
        """One document of `length` valid tokens in each row, from position `start` on."""
        shape = batch, length
        with torch.inference_mode(False):  # it may outlive the call
            position = torch.arange(start, start + length, device=device).expand(shape)
            valid = torch.ones(shape, dtype=torch.bool, device=device)
            zero, ends = position.new_zeros(shape), position.new_full(shape, start + length)
        made = Layout(position, valid, torch.zeros_like(valid), zero, ends)
        made.__dict__.update(dense=True, any_global=False, one_document=True, aligned=True, rows_alike=True)
        made.__dict__.update(
            starts_at_zero=not start or not length, implied=True, start=start, padding=None, asked=None
        )
        return made

    def _replace(self, **fields: Any) -> Tokens:  # type: ignore[override]
        return Tokens(*self)._replace(**fields)

    def cut(self, columns: slice | Tensor, rows: slice = slice(None)) -> Tokens:
        """As of `Tokens`, without facts; `columns` keeps them."""
        return Tokens(*self).cut(columns, rows)

    def __reduce__(self) -> Any:
        return Layout, tuple(self)  # facts are found again, plans made again

    implied = False
    """Whether nothing was said of the tokens: they are what the shape of a call implies."""
    start = 0
    """Position of the first column, where they are implied."""

    placement: Any = None
    """The `Placement` of the whole sequence, if these are the columns of one process alone."""

    _whole: Tensor | None = None

    def _with(self, host: Host) -> Layout:
        self.__dict__["host"] = host
        return self

    def goes_with(self, x: Tensor, *further: Any) -> bool:
        """Whether a model's call implied these tokens, of x's shape, and nothing else: there is nothing to check."""
        plain = self.implied and len(x) > 0 and self.valid.shape == x.shape[:-1]
        return plain and all(each is None for each in further) and not torch.compiler.is_compiling()

    # --- what the host knows -----------------------------------------------------------------------------------------

    @cached_property
    def host(self) -> Host:
        """All fields in numpy: the one place where a call's tokens are read from the device."""
        if self.implied:
            return Host.plain(self.valid.shape[0], self.valid.shape[1], self.start)
        whole = torch.stack([self[0], self[3], self[4], self[1], self[2]]) if self._whole is None else self._whole
        position, document, length, valid, is_global = whole.numpy(force=True)
        self._whole = None
        return Host(position, valid.astype(bool), is_global.astype(bool), document, length)

    @cached_property
    def dense(self) -> bool:
        """Whether there is no padding."""
        return bool(self.host.valid.all())

    @cached_property
    def read(self) -> int:
        """How many tokens are none of padding."""
        return int(self.host.valid.sum())

    @cached_property
    def any_global(self) -> bool:
        """Whether some token is global."""
        return bool((self.host.is_global & self.host.valid).any())

    @cached_property
    def documents(self) -> Array:
        """[B, 1], the number of each row's last document if all of its tokens are in it; -1: they are in several.

        A row without tokens counts as its last column does.
        """
        valid, document = self.host.valid, self.host.document
        if not document.shape[1]:
            return np.zeros((len(document), 1), np.int64)
        known = document if self.dense else np.where(valid, document, document.max(1, keepdims=True))
        return np.where((known == known[:, :1]).all(1, keepdims=True), known[:, -1:], -1)

    @cached_property
    def one_document(self) -> bool:
        """Whether no row holds two documents."""
        return bool((self.documents >= 0).all())

    @cached_property
    def rows_alike(self) -> bool:
        """Whether every batch row has the same positions, padding and documents, so that one mask serves all."""
        host = self.host
        return all(bool((field == field[:1]).all()) for field in (host.position, host.valid, host.document))

    @cached_property
    def globals_alike(self) -> bool:
        """Whether every batch row has its global tokens in the same columns."""
        return bool((self.host.is_global == self.host.is_global[:1]).all())

    @cached_property
    def starts_at_zero(self) -> bool:
        """Whether position equals column at every valid token: only right padding, one document."""
        valid, position = self.host.valid, self.host.position
        if not self.one_document or (not self.dense and bool((valid[:, 1:] & ~valid[:, :-1]).any())):
            return False
        elsewhere = position != np.arange(position.shape[1])
        return not bool((elsewhere if self.dense else elsewhere & valid).any())

    @cached_property
    def aligned(self) -> bool:
        """Whether column distance is position distance within each document: no holes, no forgotten tokens."""
        if self.dense and self.starts_at_zero:
            return True
        host = self.host
        earlier = before(host.valid)
        at = earlier.clip(min=0)
        follows = host.valid & (earlier >= 0) & (np.take_along_axis(host.document, at, 1) == host.document)
        gap = host.position - np.take_along_axis(host.position, at, 1)
        return not bool((follows & (gap != np.arange(gap.shape[1]) - earlier)).any())

    # --- what layers share -------------------------------------------------------------------------------------------

    @cached_property
    def padding(self) -> Bool[Tensor, "B L 1"] | None:
        """True at padding; None where there is none."""
        return None if self.dense else ~self.valid[..., None]

    def blanked(self, x: Tensor) -> Tensor:
        """x [B, L, E] with zeros at padding, so that not even NaN spreads from it."""
        return x if self.padding is None else x.masked_fill(self.padding, 0)

    @cached_property
    def asked(self) -> Bool[Tensor, "B 1 L 1"] | None:
        """Which rows are queries; None: all."""
        return None if self.dense else self.valid[:, None, :, None]

    @cached_property
    def on_host(self) -> Tokens:
        """The same tokens as tensors of the CPU, for what a pattern computes in a plan."""
        return self if self.valid.device.type == "cpu" else host_tokens(self.host)

    @cached_property
    def _plans(self) -> dict[Hashable, Any]:
        return {}

    def plan(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """What `make` gives, made once for each key. It must depend on this layout and on the key alone."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def marked(self, mark: Mark) -> Layout:
        """With those tokens global that a pattern makes so by their position; the same object for the same answer."""
        found = array_of(mark(self.on_host).is_global)
        if np.array_equal(found, self.host.is_global):
            return self
        kept: list[Layout] = self.plan("marked", list)
        for layout in kept:
            if np.array_equal(found, layout.host.is_global):
                return layout
        kept.append(self.with_globals(found.copy()))
        return kept[-1]

    def with_globals(self, flags: Array) -> Layout:
        """The same tokens, of which these are global."""
        fields = Tokens(*self)._replace(is_global=tensor_of(flags, self.valid.device))
        made = Layout(*fields)._with(self.host._replace(is_global=flags))
        made.__dict__.update({fact: self.__dict__[fact] for fact in _WITHOUT_GLOBALS if fact in self.__dict__})
        return made

    def columns(self, columns: slice) -> Layout:
        """The same columns of all rows; one object for each cut."""
        if columns == slice(None) or columns == slice(0, self.valid.shape[1]):
            return self
        key = ("columns", columns.start, columns.stop, columns.step)
        return self.plan(key, lambda: Layout(*self.cut(columns))._with(self.host.cut(columns)))


_WITHOUT_GLOBALS = (
    "dense", "documents", "one_document", "rows_alike", "starts_at_zero", "aligned", "padding", "asked", "placement",
)  # fmt: skip
"""Facts to which global tokens are as others; where the columns live is one."""


def ends(keys: Layout, queries: Layout) -> bool:
    """Whether the queries are the last columns of the keys, token for token."""
    if keys is queries:
        return True
    L, S = queries.valid.shape[1], keys.valid.shape[1]
    if L > S:
        return False
    mine, theirs = queries.host, keys.host.cut(slice(S - L, S))
    pairs = ((mine.position, theirs.position), (mine.valid, theirs.valid), (mine.document, theirs.document))
    return all(np.array_equal(a, b) for a, b in pairs)
