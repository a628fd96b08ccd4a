"""Attention to keys that are made of the tokens' own, groups of them or means: what such mechanisms share, once.

A mechanism says two things: what a call's keys and values become, beside those of earlier calls (`keep`), and what
queries are told of these (`answer`). Projections, checks, states and the core without projections follow. It is for
what is no pattern of tokens; for that there is attention/pattern.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.closing import Closing
from attention_zoo.attention.operator import one_operator, refuse_export
from attention_zoo.contract import Output, Source, Tokens, at_least
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, none
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.place import place_of

DOCUMENT = Horizon()
"""What a later token may see: all of its document."""


class DerivedKeys(Closing):
    """Base of mechanisms that attend to what they make of keys and values. Final but for
    `keep`, `answer`, `in_place` and costs.

    Args:
        shared: the options of `Attention`.
    """

    def __init__(self, **shared: Any):
        super().__init__(**shared)
        width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, kv_width, bias=self.bias_into)

    def built(self) -> None:
        # the last to be drawn, after a mechanism's own
        self.to_out = nn.Linear(self.heads * self.head_width, self.dim, bias=self.bias_out)

    # --- what a mechanism says about itself --------------------------------------------------------------------------

    def keep(
        self, layout: Layout, k: Float[Tensor, "B K L D"], v: Float[Tensor, "B K L D"], state: Any
    ) -> tuple[Columns, Any]:
        """All that a call's queries may see, and the state behind the call; by default keys and values as they are.

        Args:
            k, v: of the call's tokens.
            state: None: there is none, and none is kept.
        """
        if state is None:
            return Columns.of(layout, k, v), None
        held = state.append(layout, k, v, horizon=DOCUMENT)
        return held, held.settle(layout, horizon=DOCUMENT)[0]

    def answer(
        self, q: Float[Tensor, "B H L D"], queries: Layout, held: Columns, scale: float
    ) -> Float[Tensor, "B H L D"]:
        """What queries are told of what `keep` held; zeros at padding."""
        raise NotImplementedError

    def alone(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        keys: Layout,
        scale: float,
    ) -> Float[Tensor, "B H L D"]:
        """The same of a call's own keys and values, without a state."""
        return self.answer(q, queries, self.keep(keys, k, v, None)[0], scale)

    def in_place(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K L D"],
        v: Float[Tensor, "B K L D"],
    ) -> Float[Tensor, "B H L D"]:
        """The same of one process's columns of a sequence that several own."""
        raise NotImplementedError

    # --- final: running it -------------------------------------------------------------------------------------------

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Columns, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Any:
        """As of `Layer`: no columns."""
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, self.kv_heads, 0, self.head_width, device=device, dtype=dtype)
        return Columns.of(none(batch_size, device), empty, empty)

    @one_operator
    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`. With a state, every call's output equals the last rows of the whole prefix."""
        x, layout = self.enter(x, tokens, state, source, choices)
        if state is None:
            return self._closed_up(self._attended, x, layout)
        return self._attended(x, layout, state)

    def _attended(self, x: Float[Tensor, "B L E"], layout: Layout, state: Any = None) -> Output:
        q, k, v = (self._heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        if layout.placement is not None:
            out = self.in_place(q, layout, k, v)
        elif state is None:
            out = self.alone(q, layout, k, v, layout, self.scale)
        else:
            held, state = self.keep(layout, k, v, state)
            out = watch(self.answer(q, layout, held, self.scale), held.tokens)
        return Output(self.to_out(out.transpose(1, 2).flatten(2)), state)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Any) -> Any:
        """See `Attention`: keys and values alone."""
        x, layout = self.enter(x, tokens, state, None)
        return self.keep(layout, self._heads(self.to_k(x)), self._heads(self.to_v(x)), state)[1]

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        keys: Tokens | None = None,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The mechanism on given queries, keys and values, for use in models of one's own.

        Args:
            keys: tokens of the S columns, of which the last L are the queries'; default all valid from position 0. At
                padding the output is zero.
            scale: factor on q·k; default the layer's.

        Raises:
            ValueError: for shapes that do not fit the layer or each other.
        """
        refuse_export(self.name)
        if not self._fits(q, k, v):
            raise ValueError(
                f"q must be [batch, {self.heads}, length, {self.head_width}] and k, v [batch, {self.kv_heads}, keys, "
                f"{self.head_width}] with at least as many keys as queries, got {tuple(q.shape)}, {tuple(k.shape)} and "
                f"{tuple(v.shape)}"
            )
        B, L, S = len(q), q.shape[2], k.shape[2]
        layout = Layout.plain(B, S, q.device) if keys is None else Layout.of(keys)
        if layout.valid.shape != (B, S):
            raise ValueError(f"keys must have shape {(B, S)}, got {tuple(layout.valid.shape)}")
        if not q.numel():
            return zeros_for(q, (q, k, v, *self.parameters()))
        queries = layout.columns(slice(S - L, S))
        return self.alone(q, queries, k, v, layout, self.scale if scale is None else scale)

    def _heads(self, x: Float[Tensor, "B L KD"]) -> Float[Tensor, "B K L D"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _fits(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        if q.ndim != 4 or k.ndim != 4:
            return False
        (B, _, L, _), S, D = q.shape, k.shape[2], self.head_width
        return q.shape == (B, self.heads, L, D) and k.shape == v.shape == (B, self.kv_heads, S, D) and L <= S
