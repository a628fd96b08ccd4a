"""One call of a pattern: its operands, its tokens, and everything that a kernel may ask about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention_zoo.contract import Tokens, check_scale
from attention_zoo.ops.columns import Columns


@runtime_checkable  # for the run-time type checks of the tests
class Pattern(Protocol):
    """What a pattern says about itself; see attention/pattern.py for the meaning of each."""

    causal: bool
    tile: int

    @property
    def shift_invariant(self) -> bool: ...
    @property
    def reach(self) -> int | None: ...
    @property
    def strides(self) -> Sequence[int]: ...
    @property
    def unweighted(self) -> bool: ...
    @property
    def counts_keys(self) -> bool: ...
    def bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...
    def scores_bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...
    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None: ...
    def full_bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...
    def near(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, length: Tensor) -> Tensor: ...


@dataclass
class PatternCall:
    """Operands [B, H, L, D] x [B, K, S, D], marked tokens, and the pattern that relates them."""

    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tokens
    keys: Tokens
    scale: float
    learned: Sequence[Tensor] = ()
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None  # a second projection, for global queries (Longformer)
    columns: Columns | None = None  # where k, v and keys are held, if in a state
    globals: Tensor | None = None  # [B, g], columns of the global keys, if they are listed; -1 fills

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.scale > 0:
            return
        # the sign goes into the queries: what hides keys before it scales, or bounds scores, may rely on scale > 0
        sign, self.scale = (-1, -self.scale) if self.scale else (0, 1.0)
        self.q = self.q * sign
        if self.global_qkv is not None:
            q, k, v = self.global_qkv
            self.global_qkv = q * sign, k, v

    # --- the definition, in pieces ---------------------------------------------------------------------------------
    def seen(self, queries: Tokens, keys: Tokens) -> Tensor:
        """Bool [B, 1, L, S]: padding, document and causality."""
        seen = keys.valid[:, None, :]
        if not self.one_document:
            seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])
        if self.pattern.causal:
            seen = seen & (keys.position[:, None, :] <= queries.position[:, :, None])
        return seen[:, None]

    def local_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        """What local tiles use: global keys are left to their own part, where each counts once."""
        seen = self.seen(queries, keys)
        if self.any_global_key:
            seen = seen & ~keys.is_global[:, None, None, :]
        return self.pattern.scores_bias(queries, keys).masked_fill(~seen, -torch.inf)

    # --- facts about the layout ------------------------------------------------------------------------------------
    @cached_property
    def any_global_key(self) -> bool:
        return bool((self.keys.is_global & self.keys.valid).any())

    @cached_property
    def any_global_query(self) -> bool:
        return bool((self.queries.is_global & self.queries.valid).any())

    @cached_property
    def has_position_bias(self) -> bool:
        """Whether the position scheme adds to the scores."""
        one = (tokens.cut(slice(0, 1)) for tokens in (self.queries, self.keys))
        return self.pattern.position_bias(*one) is not None

    @cached_property
    def all_valid(self) -> bool:
        return bool(self.keys.valid.all())

    @cached_property
    def asked(self) -> Tensor | None:
        """Bool [B, 1, L, 1], which rows are queries; None: all. The others are padding: whatever runs them yields zeros
        there, since backward multiplies what a row holds by its gradient, and 0 · NaN is NaN."""
        if (self.all_valid and self.own_keys) or bool(self.queries.valid.all()):
            return None
        return self.queries.valid[:, None, :, None]

    def blank(self, out: Tensor, seen: Tensor | None = None) -> Tensor:
        """The output with zeros where no query is, nor, if given, any of the `seen` keys, bool [#B, 1, #L, S]."""
        rows = self.asked if seen is None else seen.any(-1, keepdim=True) & self.queries.valid[:, None, :, None]
        if rows is None:
            return out
        # in the order of memory: the copy that this makes is the one that the next projection reads
        return out.transpose(1, 2).masked_fill(~rows.transpose(1, 2), 0).transpose(1, 2)

    @cached_property
    def one_document(self) -> bool:
        """Whether no row holds two documents."""
        document = self.keys.document
        if not document.numel():
            return True
        known = document
        if not self.all_valid:
            known = torch.where(self.keys.valid, document, document.amax(1, keepdim=True))
        same = bool((known == known[:, :1]).all())
        return same and (self.own_keys or bool((self.queries.document == known[:, -1:]).all()))

    @cached_property
    def own_keys(self) -> bool:
        """Whether queries are the last rows of the keys, token for token."""
        L, S = self.queries.valid.shape[1], self.keys.valid.shape[1]
        if L > S:
            return False
        tail = self.keys.cut(slice(S - L, S))
        names = ("position", "valid", "document")
        return all(_equal(getattr(tail, name), getattr(self.queries, name)) for name in names)

    @cached_property
    def rows_alike(self) -> bool:
        """Whether every batch row has the same positions, padding and documents, so that one mask serves all."""
        return all(
            torch.equal(field, field[:1].expand_as(field))
            for tokens in (self.queries, self.keys)
            for field in (tokens.position, tokens.valid, tokens.document)
        )

    @cached_property
    def aligned(self) -> bool:
        """Whether column distance is position distance within each document: no holes, no forgotten keys."""
        if not self.own_keys:
            return False
        if self.all_valid and self.starts_at_zero:
            return True
        tokens = self.keys
        column = torch.arange(tokens.valid.shape[1], device=tokens.valid.device).expand_as(tokens.valid)
        last = torch.where(tokens.valid, column, -1).cummax(1).values
        before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        at = before.clamp(min=0)
        follows = tokens.valid & (before >= 0) & (tokens.document.gather(1, at) == tokens.document)
        gap = tokens.position - tokens.position.gather(1, at)
        return not bool((follows & (gap != column - before)).any())

    @cached_property
    def starts_at_zero(self) -> bool:
        """Whether position equals column at every valid token of an aligned call: only right padding, one document."""
        valid = self.keys.valid
        if not self.own_keys or not self.one_document:
            return False
        if not self.all_valid and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            return False
        elsewhere = self.keys.position != torch.arange(self.k.shape[2], device=self.k.device)
        return not bool((elsewhere if self.all_valid else elsewhere & valid).any())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same; those in the same memory are not looked at."""
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same or torch.equal(a, b)
