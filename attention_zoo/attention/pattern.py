"""Pattern attention: a mechanism that says which keys a query sees, and with what weight. All else is here, once.

A pattern overrides up to three small things: `mark` (tokens that it makes global by position), `bias` (its definition,
pairwise) and `reach` (a value: how far its queries see, see layout/reach.py). Training, chunked prefill, cached
decoding, padding, documents, grouped heads, the dense oracle and the pictures of the report all follow from these.

The base alone applies, in this order: mark, bias, global override, position bias; then padding, document and causality.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attention_zoo.attention.closing import Closing
from attention_zoo.attention.operator import one_operator, refuse_export
from attention_zoo.attention.placed import output_in_place
from attention_zoo.contract import Output, Source, Tokens, at_least, known_options
from attention_zoo.layout.by_heads import ByHeads
from attention_zoo.layout.kernel import Kernel, check_name, choose, explain, kernels_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, none
from attention_zoo.layout.reach import BEFORE, Anywhere, Band, Reach
from attention_zoo.ops.pattern.call import PatternCall, seen
from attention_zoo.ops.pattern.choose import KERNELS
from attention_zoo.ops.pattern.first import position_bias_in_cache, turned_queries
from attention_zoo.ops.pattern.heads import (
    SomeHeads,
    apart,
    groups_of,
    merge,
    query_heads,
    reach_by_head,
    runs_whole,
    split,
)  # fmt: skip
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.place import place_of
from attention_zoo.positions import ATTENTION_LEVEL
from attention_zoo.rules import Unsupported


class PatternAttention(Closing):
    """Base of all patterns. Final but for `mark`, `bias`, `reach`, `losses`, `bias_parameters` and `run`.

    Args:
        sink_logit: learn for each head the score of one more key, whose value is zero, so that it may look at nothing
            (gpt-oss); at first 0.
        kernel: "auto" takes the fastest of the pattern's kernels that runs a call exactly; a name takes that one or
            raises.
        shared: the options of `Attention`.
    """

    reach: Reach = Anywhere()
    """How far a query sees, beyond which `bias` is -inf: what kernels, plans and caches follow from. An attribute, or a
    property of options that may change."""
    tile = 64
    """Query rows of a tile, few so that little of what is read is hidden; twice as many where tiles must be looked for.
    Smaller in tests, so that short lengths straddle many borders."""
    travels: str | None = "keys within reach; a ring of all keys where nothing ends it"
    computes_apart = False
    """Whether `run` computes rows of global queries in another way, by the q, k, v of `global_operands`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in cls.__dict__:
            if name in BEFORE:
                raise Unsupported(
                    getattr(cls, "name", cls.__name__), f"the class attribute {name}",
                    "a pattern says by `reach` alone how far it sees and how it weighs", BEFORE[name],
                )  # fmt: skip

    def __init__(self, *, sink_logit: bool = False, kernel: str = "auto", **shared: Any):
        super().__init__(**shared)
        if self.cross and self.positions != "none":
            asked = f"positions={self.positions}"
            raise Unsupported(self.name, asked, "in cross-attention nothing is before", "positions=none")
        self.kernel = kernel
        width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)
        self.sink = nn.Parameter(torch.zeros(self.heads)) if sink_logit else None
        scheme = ATTENTION_LEVEL[self.positions]
        known_options(f"positions={self.positions}", self.position_options, scheme.options)
        self.scheme = scheme(heads=self.heads, head_width=self.head_width, **self.position_options)

    def built(self) -> None:
        if not isinstance(self.reach, Reach):
            band = f"Band({self.reach})" if type(self.reach) is int else "Band(...)"
            raise Unsupported(
                self.name, f"reach={self.reach!r}", "a reach is a value that kernels and caches can read",
                f"reach = {band}, Blocks(...) or Anywhere() of attention_zoo.layout.reach",
            )  # fmt: skip
        if isinstance(self.reach, Band) and self.reach.heads - {self.heads, 1}:
            raise ValueError(f"reach must say one number, or one for each of {self.heads} heads, got {self.reach}")
        check_name(self.name, self.kernels, self.kernel)

    @property
    def kernels(self) -> tuple[Kernel[PatternCall], ...]:
        """Those that the pattern has, fastest first: they follow from its reach."""
        known: tuple[Reach, tuple[Kernel[PatternCall], ...]] | None = self.__dict__.get("_kernels")
        if known is None or known[0] is not self.reach:
            known = self.__dict__["_kernels"] = self.reach, kernels_of(KERNELS, self)
        return known[1]

    # --- what a pattern says about itself --------------------------------------------------------------------------

    def mark(self, tokens: Tokens) -> Tokens:
        """Tokens with those marked global that this pattern makes global by their position.

        Must look at each token by itself, and be idempotent. Called with tokens on the host, whatever the device.
        """
        return tokens

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "#B #H L S"]:
        """The definition. Pairwise: each cell depends on its two tokens alone.

        -inf unseen, 0 seen, other finite values weigh (log 2: counted twice). Padding, documents and causality are
        applied by the base.
        """
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, weighted already."""
        return {}

    def bias_parameters(self) -> tuple[Tensor, ...]:
        """Parameters that `bias` depends on."""
        return ()

    def run(self, call: PatternCall, x: Tensor) -> Tensor:
        """The output [B, H, L, D] of a call over hidden states x: where `computes_apart`, with its rows put in."""
        return self._run(call, self.kernel)

    # --- final: the definition assembled ---------------------------------------------------------------------------

    @property
    def has_position_bias(self) -> bool:
        """Whether the position scheme adds to the scores."""
        return self.scheme.has_bias

    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None:
        """What the position scheme adds to the scores, if anything."""
        if not self.scheme.has_bias:
            return None
        bias = partial(self.scheme.bias, keys=keys, dtype=place_of(self)[1])
        return position_bias_in_cache(self.reach, bias, queries, keys)

    def scores_bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "#B #H L S"]:
        """`bias` and position bias, before masks and without the global override."""
        bias, extra = self.bias(queries, keys), self.position_bias(queries, keys)
        return bias if extra is None else bias + extra

    def full_bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B #H L S"]:
        """Everything that is added to the scores: the whole definition. L x S, for oracles, pictures and counting."""
        plain = alone = False
        queries, keys = self.mark(queries), self.mark(keys)
        if isinstance(queries, Layout) and isinstance(keys, Layout):  # nothing was marked: facts are still theirs
            plain = not queries.any_global and not keys.any_global
            alone = keys.one_document and bool((queries.host.document == keys.documents).all())
        bias, extra = self.bias(queries, keys), self.position_bias(queries, keys)
        if not plain:
            everyone = queries.is_global[:, None, :, None] | keys.is_global[:, None, None, :]
            bias = bias.masked_fill(everyone, 0)
        bias = bias if extra is None else bias + extra
        return bias.masked_fill(~seen(queries, keys, causal=self.causal, one_document=alone), -torch.inf)

    # --- final: running it -----------------------------------------------------------------------------------------

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        queries: Tokens | None = None,
        keys: Tokens | None = None,
        *,
        scale: float | None = None,
        kernel: str | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The pattern on given queries, keys and values (rotated already): for use in models of one's own.

        Args:
            keys: tokens of the S columns; default all valid from position 0.
            queries: tokens of the L rows; default the last L of the keys.
            scale: factor on q·k; default the layer's.
            kernel: default the layer's.
        """
        refuse_export(self.name)
        return self._run(self._call(q, k, v, queries, keys, scale), self.kernel if kernel is None else kernel)

    def explain(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens | None = None, keys: Tokens | None = None
    ) -> list[tuple[str, str | None]]:
        """Every kernel, fastest first, with all reasons why it cannot run this call, or None."""
        return explain(self.kernels, self._call(q, k, v, queries, keys, None))

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`."""
        one = torch.empty(1, 1, 1, self.head_width, device=device, dtype=dtype)
        q, k = (one.expand(-1, heads, length, -1) for heads in (self.heads, self.kv_heads))
        return self.explain(q, k, k, *[Layout.plain(1, length, device)] * 2)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens | None, keys: Tokens | None, scale: float | None
    ) -> PatternCall:
        if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                "q must be [B, H, L, D] and k, v [B, K, S, D] with K dividing H, "
                f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        L, S = q.shape[2], k.shape[2]
        itself = queries is keys and queries is not None
        held = Layout.plain(k.shape[0], S, k.device) if keys is None else Layout.of(keys)
        mine = held if itself else held.columns(slice(max(0, S - L), S)) if queries is None else Layout.of(queries)
        for name, tokens, columns in (("queries", mine, L), ("keys", held, S)):
            if tokens.valid.shape != (q.shape[0], columns):
                raise ValueError(f"{name} must have shape {(q.shape[0], columns)}, got {tuple(tokens.valid.shape)}")
        marked = self._marked(held)
        asked = marked if mine is held else self._marked(mine)
        scale = self.scale if scale is None else scale
        return PatternCall(self, q, k, v, asked, marked, scale, self.bias_parameters(), sink=self.sink)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return (Columns, ByHeads), self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Columns | ByHeads:
        """As of `Layer`; columns by groups of heads where heads reach differently far."""
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        ledger = none(batch_size, device)

        def empty(heads: int) -> Columns:
            zeros = torch.zeros(batch_size, heads, 0, self.head_width, device=device, dtype=dtype)
            return Columns.of(ledger, zeros, zeros)

        back = None if self.computes_apart else reach_by_head(self.reach)
        if back is None:
            return empty(self.kv_heads)
        groups = groups_of(back, self.heads // self.kv_heads, self.tile)
        return ByHeads(tuple(empty(len(heads)) for heads in groups), groups)

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
        if isinstance(tokens, Layout) and tokens.goes_with(x, state, source, choices) and not self.cross:
            return self._attended(x, tokens)
        return self._checked(x, tokens, state=state, source=source, choices=choices)

    @one_operator
    def _checked(
        self, x: Tensor, tokens: Tokens | None = None, *, state: Any = None, source: Any = None, choices: Any = None
    ) -> Output:
        x, layout = self.enter(x, tokens, state, source, choices)
        if state is None and not self.cross and self.kernel != "dense":  # which is the definition, of tokens as given
            return self._closed_up(self._attended, x, layout, front=False)
        return self._attended(x, layout, state, source)

    def _attended(
        self, x: Tensor, layout: Layout, state: Columns | ByHeads | None = None, source: Source | None = None
    ) -> Output:
        if layout.placement is not None:
            return output_in_place(self, x, layout)
        q, turned = self._heads(self.to_q(x)), None
        layout = self._marked(layout)
        if isinstance(state, ByHeads):
            return self._attended_by_heads(x, self.scheme.turn(q, layout), layout, state)
        if self.cross:
            new = held = self._source_keys(state, source)
        else:
            turned = turned_queries(self.reach, q, layout, self.scheme.turn)
            q = self.scheme.turn(q, layout)
            k, v = self._own_keys(x, layout)
            new = held = Columns.of(layout, k, v) if state is None else self._append(state, layout, k, v)
        call = self._on(self, q, layout, held, sink=self.sink, turned=turned)
        out = self.run(call, x)
        if state is not None:
            out = watch(out, call.keys)
            new = held if self.cross else held.settle(layout, horizon=self._horizon)[0]
        hidden = self.to_out(out.transpose(1, 2).flatten(2))
        return Output(hidden, None if state is None else new, self.losses())

    def _on(self, pattern: Any, q: Tensor, layout: Layout, held: Columns, **more: Any) -> PatternCall:
        """Of queries on columns that are held."""
        learned, apart, (k, v) = self.bias_parameters(), self.computes_apart, held.held
        return PatternCall(pattern, q, k, v, layout, held.tokens, self.scale, learned, apart, held, **more)

    def _attended_by_heads(self, x: Tensor, q: Tensor, layout: Layout, state: ByHeads) -> Output:
        """With a state whose groups of heads hold columns of their own: a call for each."""
        patterns, groups = self._groups(state)
        held, outs = self._append_by_heads(state, layout, *self._own_keys(x, layout)), []
        for pattern, some, part in zip(patterns, split(q, groups), held.parts):
            run = self._run(self._on(pattern, some, layout, part, sink=pattern.of(self.sink)), self.kernel)
            outs.append(watch(run, part.tokens))
        hidden = self.to_out(merge(outs, groups).transpose(1, 2).flatten(2))
        new = held.settle(layout, horizons=[self._horizon_of(pattern.reach) for pattern in patterns])
        return Output(hidden, new, self.losses())

    def _groups(self, state: ByHeads) -> tuple[list[SomeHeads], list[tuple[int, ...]]]:
        """What each group of a state's heads sees by now, and its query heads."""
        groups = [query_heads(heads, self.heads // self.kv_heads) for heads in state.heads]
        return [SomeHeads(self, heads) for heads in groups], groups

    def _append_by_heads(self, state: ByHeads, layout: Layout, k: Tensor, v: Tensor) -> ByHeads:
        horizons = [self._horizon_of(pattern.reach) for pattern in self._groups(state)[0]]
        if layout.any_global:
            for part, horizon in zip(state.parts, horizons):
                self._refuse_late(part, layout, horizon)
        return state.append(layout, split(k, state.heads), split(v, state.heads), horizons=horizons)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Columns | ByHeads) -> Columns | ByHeads:
        """See `Attention`: keys and values alone."""
        x, layout = self.enter(x, tokens, state, None)
        layout = self._marked(layout)
        k, v = self._own_keys(x, layout)
        if isinstance(state, ByHeads):
            horizons = [self._horizon_of(pattern.reach) for pattern in self._groups(state)[0]]
            return self._append_by_heads(state, layout, k, v).settle(layout, horizons=horizons)
        return self._append(state, layout, k, v).settle(layout, horizon=self._horizon)[0]

    def _marked(self, layout: Layout) -> Layout:
        return layout if type(self).mark is PatternAttention.mark else layout.marked(self.mark)

    def _own_keys(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return self.scheme.turn(self._heads(self.to_k(x)), layout), self._heads(self.to_v(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], x.shape[2] // self.head_width, self.head_width).transpose(1, 2)

    def _source_keys(self, state: Columns | None, source: Source | None) -> Columns:
        """Keys and values of the source, or those that the state has of it."""
        if source is None:
            return cast(Columns, state)
        hidden, layout = self.enter_source(source)
        return Columns.of(self._marked(layout), self._heads(self.to_k(hidden)), self._heads(self.to_v(hidden)))

    def _run(self, call: PatternCall, kernel: str) -> Float[Tensor, "B H L D"]:
        if not (call.q.numel() and call.k.numel()):
            return zeros_for(call.q, [x for x in (call.q, call.k, call.v, call.sink) if x is not None])
        parts = None if kernel == "dense" or runs_whole(self.kernels, kernel, call) else apart(call)
        if parts is None:
            return choose(self.name, self.kernels, kernel, call).run(call)
        return merge([choose(self.name, self.kernels, kernel, each).run(each) for each in parts[0]], parts[1])

    @property
    def _horizon(self) -> Horizon:
        """What a later token may still see."""
        return self._horizon_of(self.reach)

    def _horizon_of(self, reach: Reach) -> Horizon:
        far, first = reach.farthest, reach.first
        return Horizon() if far is None else Horizon(far, first=first, most=far + first)

    def _append(self, state: Columns, layout: Layout, k: Tensor, v: Tensor) -> Columns:
        forgets = self.computes_apart or self.reach.farthest is not None
        if forgets and layout.any_global:
            self._refuse_late(state, layout, self._horizon)
        return state.append(layout, k, v, horizon=self._horizon)

    def _refuse_late(self, state: Columns, layout: Layout, horizon: Horizon) -> None:
        """Global tokens in a document that earlier calls began: the keys that they must see may be forgotten."""
        if not state.filled:
            return
        held, new = state.ledger.host, layout.host
        late = new.is_global & new.valid & (new.document == held.last_document)
        if not self.computes_apart:  # with projections of their own they need all of their keys in the call
            forgotten = (horizon.live(held) & held.valid).sum(1) < held.next_position
            late = late & forgotten[:, None]
        if bool(np.any(late)):
            raise Unsupported(
                self.name, "a global token after the first call", "keys that it must see are not kept",
                "global tokens in the first call",
            )  # fmt: skip

    def enter_source(self, source: Source) -> tuple[Tensor, Layout]:
        """Hidden states of the source with padding zeroed, and its tokens."""
        if source.hidden.ndim != 3 or source.hidden.shape[-1] != self.dim:
            raise ValueError(f"source.hidden must be [batch, length, {self.dim}], got {tuple(source.hidden.shape)}")
        layout = Layout.of(source.tokens)
        return layout.blanked(source.hidden), layout


def hide(seen: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 where seen, -inf elsewhere: a plain pattern's bias."""
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill(~seen, -torch.inf)
