"""One call of a pattern: its operands, what is known of its tokens, and the definition in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from attention_zoo.layout.layout import Layout, ends
from attention_zoo.layout.ledger import Columns
from attention_zoo.layout.reach import Band, Blocks, Reach
from attention_zoo.rules import check_scale
from attention_zoo.tokens import Tokens


@runtime_checkable  # for the run-time type checks of the tests
class Pattern(Protocol):
    """What a pattern says about itself; see attention/pattern.py for the meaning of each."""

    causal: bool
    tile: int

    @property
    def reach(self) -> Reach: ...
    @property
    def has_position_bias(self) -> bool: ...
    def bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...
    def scores_bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...
    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None: ...
    def full_bias(self, queries: Tokens, keys: Tokens) -> Tensor: ...


@dataclass
class PatternCall:
    """Operands [B, H, L, D] x [B, K, S, D], marked tokens, and the pattern that relates them.

    Fields:
        apart: whether rows of global queries are not asked for here: whoever calls computes them in another way.
        columns: where k, v and keys are held, if in a state.
        sink: [H], for each head the score of one more key, whose value is zero; None: there is none.
        tiled: whether global keys are to local tiles as all others are.
        turned: [B, H, L, D], the queries as the first tokens beyond a band see them; None: the same.
        second: q, k, v of a second projection of the queries' tokens, by which the kernel is to compute rows of global
            queries; None: it is not, or they have none.
    """

    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    queries: Layout
    keys: Layout
    scale: float
    learned: Sequence[Tensor] = ()
    apart: bool = False
    columns: Columns | None = None
    sink: Tensor | None = None
    turned: Tensor | None = None
    tiled: bool = False
    second: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.scale > 0:
            return
        # the sign goes into the queries: what hides keys before it scales, or bounds scores, may rely on scale > 0
        given, self.scale = self.scale, -self.scale or 1.0
        self.q = signed(self.q, given)
        self.turned = None if self.turned is None else signed(self.turned, given)

    # --- the definition, in pieces ---------------------------------------------------------------------------------
    def seen(self, queries: Tokens, keys: Tokens) -> Tensor:
        """Bool [B, 1, L, S]: padding, document and causality."""
        return seen(queries, keys, causal=self.pattern.causal, one_document=self.one_document)

    def local_bias(self, queries: Tokens, keys: Tokens) -> Tensor:
        """What local tiles use: global keys are left to their own part, where each counts once."""
        seen = self.seen(queries, keys)
        if self.hides_globals:
            seen = seen & ~keys.is_global[:, None, None, :]
        return self.pattern.scores_bias(queries, keys).masked_fill(~seen, -torch.inf)

    def blank(self, out: Tensor, seen: Tensor | None = None) -> Tensor:
        """The output with zeros where no query is, nor, if given, any of the `seen` keys, bool [#B, 1, #L, S]."""
        rows = self.asked if seen is None else self.seeing(seen)
        return out if rows is None else self.blank_rows(out, rows)

    def seeing(self, seen: Tensor) -> Tensor:
        """Bool [B, 1, L, 1], which rows are queries that see a key."""
        return seen.any(-1, keepdim=True) & self.queries.valid[:, None, :, None]

    @staticmethod
    def blank_rows(out: Tensor, rows: Tensor) -> Tensor:
        """The output with zeros outside these rows."""
        # in the order of memory: the copy that this makes is the one that the next projection reads
        return out.transpose(1, 2).masked_fill(~rows.transpose(1, 2), 0).transpose(1, 2)

    # --- what is known ---------------------------------------------------------------------------------------------
    @property
    def lengths(self) -> tuple[int, int]:
        """L queries, S keys."""
        return self.q.shape[2], self.k.shape[2]

    @property
    def band(self) -> Band:
        """The pattern's reach, for kernels that need it to be a band."""
        return cast(Band, self.pattern.reach)

    @property
    def blocks(self) -> Blocks:
        """The pattern's reach, for kernels that need it to be blocks."""
        return cast(Blocks, self.pattern.reach)

    @property
    def any_global_key(self) -> bool:
        return self.keys.any_global

    @property
    def hides_globals(self) -> bool:
        """Whether local tiles leave out global keys."""
        return self.any_global_key and not self.tiled

    @property
    def any_global_query(self) -> bool:
        """Whether some row, asked for here, sees everything."""
        return self.queries.any_global and not self.apart

    @property
    def has_position_bias(self) -> bool:
        """Whether the position scheme adds to the scores."""
        return self.pattern.has_position_bias

    @property
    def all_valid(self) -> bool:
        """Whether no key is padding."""
        return self.keys.dense

    @property
    def asked(self) -> Tensor | None:
        """Bool [B, 1, L, 1], which rows are queries; None: all. The others are padding: whatever runs them yields zeros
        there, since backward multiplies what a row holds by its gradient, and 0 · NaN is NaN."""
        return self.queries.asked

    @cached_property
    def one_document(self) -> bool:
        """Whether no row holds two documents."""
        if self.own_keys or not self.keys.one_document:
            return self.keys.one_document
        return bool((self.queries.host.document == self.keys.documents).all())

    @cached_property
    def own_keys(self) -> bool:
        """Whether queries are the last rows of the keys, token for token."""
        return ends(self.keys, self.queries)

    @property
    def rows_alike(self) -> bool:
        """Whether every batch row has the same positions, padding and documents, so that one mask serves all."""
        return self.keys.rows_alike and self.queries.rows_alike

    @property
    def aligned(self) -> bool:
        """Whether column distance is position distance within each document: no holes, no forgotten keys."""
        return self.own_keys and self.keys.aligned

    @property
    def starts_at_zero(self) -> bool:
        """Whether position equals column at every valid token of an aligned call: only right padding, one document."""
        return self.own_keys and self.keys.starts_at_zero


def signed(q: Tensor, scale: float) -> Tensor:
    """Queries with the sign of the scale, so that it can be taken for a positive one."""
    return q if scale > 0 else q * (-1 if scale else 0)


def seen(queries: Tokens, keys: Tokens, *, causal: bool, one_document: bool) -> Tensor:
    """Bool [B, 1, L, S]: padding, document unless all are of one, and causality."""
    seen = keys.valid[:, None, :]
    if not one_document:
        seen = seen & (keys.document[:, None, :] == queries.document[:, :, None])
    if causal:
        seen = seen & (keys.position[:, None, :] <= queries.position[:, :, None])
    return seen[:, None]
