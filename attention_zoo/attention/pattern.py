"""Pattern attention: a mechanism that says which keys a query sees, and with what weight. All else is here, once.

A pattern overrides up to three small things: `mark` (tokens that it makes global by position), `bias` (its definition,
pairwise) and `near` or `reach` (which tiles can matter). Training, chunked prefill, cached decoding, padding,
documents, grouped heads, the dense oracle and the pictures of the report all follow from these.

The base alone applies, in this order: mark, bias, global override, position bias; then padding, document and causality.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.contract import (
    Attention,
    Output,
    Source,
    Tokens,
    Unsupported,
    at_least,
    hold,
    known_options,
    unshared,
)
from attention_zoo.ops.columns import Columns
from attention_zoo.ops.compiled import one_operator, refuse_export
from attention_zoo.ops.dispatch import DENSE, TILES, Kernel, check_name, choose, explain
from attention_zoo.ops.function import watch, zeros_for
from attention_zoo.ops.pattern_call import PatternCall
from attention_zoo.ops.place import place_of
from attention_zoo.ops.row import ROW
from attention_zoo.positions import ATTENTION_LEVEL


class Cache(NamedTuple):
    """State of a pattern: the keys that a later token may still see.

    Fields:
        columns: keys and values, each [B, K, S, D], positions applied already, and their tokens.
        globals: of patterns that list their blocks, the columns of global tokens, [B, g]; -1 where a row has fewer.
    """

    columns: Columns
    globals: Int[Tensor, "B g"] | None = None


class PatternAttention(Attention):
    """Base of all patterns. Final but for `mark`, `bias`, `near`, `reach`, `losses` and `bias_parameters`.

    Args:
        kernel: "auto" takes the fastest of `kernels` that runs a call exactly; a name takes that one or raises.
        shared: the options of `Attention`.
    """

    kernels: ClassVar[tuple[Kernel, ...]] = (ROW, TILES, DENSE)
    links_blocks: ClassVar[bool] = False
    """Whether it says by `links` which blocks of keys a row of query blocks sees (`ops.blocks.BlockPattern`)."""
    shift_invariant: ClassVar[bool] = False
    """Whether `bias` depends on the difference of positions alone: then one mask serves all tiles (`BANDED`)."""
    unweighted: ClassVar[bool] = False
    """Whether `bias` is 0 or -inf and nothing between, whatever the options."""
    counts_keys: ClassVar[bool] = False
    """Whether finite values of `bias` are 0 or logarithms of a few, of how often a key counts: then nobody need look
    for a row's largest score where q·k is small (ops/mild.py)."""
    tile = 64
    """Query rows of a tile, few so that little of what is read is hidden; twice as many where tiles must be looked for.
    Smaller in tests, so that short lengths straddle many borders."""

    def __init__(self, *, kernel: str = "auto", **shared: Any):
        super().__init__(**shared)
        check_name(self.name, self.kernels, kernel)
        if self.cross and self.positions != "none":
            raise Unsupported(
                self.name, f"positions={self.positions}", "in cross-attention nothing is before", "positions=none"
            )
        self.kernel = kernel
        width = self.heads * self.head_width
        kv_width = self.kv_heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)
        self.own_global = False
        scheme = ATTENTION_LEVEL[self.positions]
        known_options(f"positions={self.positions}", self.position_options, scheme.options)
        self.scheme = scheme(heads=self.heads, head_width=self.head_width, **self.position_options)

    def add_global_projections(self) -> None:
        """Give global queries projections of their own, which start as copies of the others (Longformer)."""
        self.own_global = True
        self.to_q_global, self.to_k_global, self.to_v_global = map(deepcopy, (self.to_q, self.to_k, self.to_v))

    # --- what a pattern says about itself --------------------------------------------------------------------------

    @property
    def reach(self) -> int | None:
        """How many positions away the farthest key is that a query may see; None: any. Lets caches forget."""
        return None

    @property
    def strides(self) -> Sequence[int]:
        """How many positions apart the keys stand that a query sees, for each head or one for all; the `reach` of a
        head is in proportion to its stride. Kernels skip the keys between (`BANDED`)."""
        return (1,)

    def mark(self, tokens: Tokens) -> Tokens:
        """Tokens with those marked global that this pattern makes global by their position. Must be idempotent."""
        return tokens

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "#B #H L S"]:
        """The definition. Pairwise: each cell depends on its two tokens alone.

        -inf unseen, 0 seen, other finite values weigh (log 2: counted twice). Padding, documents and causality are
        applied by the base.
        """
        raise NotImplementedError

    def near(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, length: Tensor
    ) -> Bool[Tensor, "#B q_tiles k_tiles"]:
        """May a tile of these position ranges (inclusive, of one document of `length` tokens) matter? Conservative."""
        reach = self.reach
        if reach is None:
            return torch.ones(torch.broadcast_shapes(q_lo.shape, k_lo.shape), dtype=torch.bool, device=q_lo.device)
        return (q_lo - k_hi <= reach) & (k_lo - q_hi <= reach)

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, weighted already."""
        return {}

    def bias_parameters(self) -> tuple[Tensor, ...]:
        """Parameters that `bias` depends on."""
        return ()

    # --- final: the definition assembled ---------------------------------------------------------------------------

    def position_bias(self, queries: Tokens, keys: Tokens) -> Tensor | None:
        return self.scheme.bias(queries, keys, place_of(self)[1]) if self.scheme.has_bias else None

    def scores_bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "#B #H L S"]:
        """`bias` and position bias, before masks and without the global override."""
        bias, extra = self.bias(queries, keys), self.position_bias(queries, keys)
        return bias if extra is None else bias + extra

    def full_bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B #H L S"]:
        """Everything that is added to the scores: the whole definition. L x S, for oracles, pictures and counting."""
        queries, keys = self.mark(queries), self.mark(keys)
        bias, extra = self.bias(queries, keys), self.position_bias(queries, keys)
        everyone = queries.is_global[:, None, :, None] | keys.is_global[:, None, None, :]
        bias = bias.masked_fill(everyone, 0)
        bias = bias if extra is None else bias + extra
        device, dtype = place_of(self)
        none = torch.empty(0, 0, 0, 0, device=device, dtype=dtype)
        seen = PatternCall(self, none, none, none, queries, keys, 1.0).seen(queries, keys)
        return bias.masked_fill(~seen, -torch.inf)

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
        global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The pattern on given queries, keys and values (rotated already): for use in models of one's own.

        Args:
            keys: tokens of the S columns; default all valid from position 0.
            queries: tokens of the L rows; default the last L of the keys.
            scale: factor on q·k; default the layer's.
            kernel: default the layer's.
            global_qkv: a second projection of the same tokens, for the rows of global queries.
        """
        refuse_export(self.name)
        return self._run(
            self._call(q, k, v, queries, keys, scale, global_qkv), self.kernel if kernel is None else kernel
        )

    def explain(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens | None = None, keys: Tokens | None = None
    ) -> list[tuple[str, str | None]]:
        """Every kernel, fastest first, with the reason why it cannot run this call, or None."""
        return explain(self.kernels, self._call(q, k, v, queries, keys, None, None))

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`."""
        q, k = (
            torch.empty(1, heads, 1, self.head_width, device=device, dtype=dtype).expand(-1, -1, length, -1)
            for heads in (self.heads, self.kv_heads)
        )
        return self.explain(q, k, k, *[Tokens.all_valid(1, length, device)] * 2)

    def _call(self, q, k, v, queries, keys, scale, global_qkv) -> PatternCall:
        if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                "q must be [B, H, L, D] and k, v [B, K, S, D] with K dividing H, "
                f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if keys is None:
            keys = unshared(Tokens.all_valid(k.shape[0], k.shape[2], k.device))
        if queries is None:
            (keys,) = hold(keys)
            queries = keys.cut(slice(k.shape[2] - q.shape[2], None))
        for name, tokens, columns in (("queries", queries, q.shape[2]), ("keys", keys, k.shape[2])):
            if tokens.valid.shape != (q.shape[0], columns):
                raise ValueError(f"{name} must have shape {(q.shape[0], columns)}, got {tuple(tokens.valid.shape)}")
        alone = queries is keys
        queries, keys = hold(queries, keys)
        marked = self.mark(keys)
        queries = marked if alone else self.mark(queries)
        scale = self.scale if scale is None else scale
        return PatternCall(self, q, k, v, queries, marked, scale, self.bias_parameters(), global_qkv)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Cache, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Cache:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, self.kv_heads, 0, self.head_width, device=device, dtype=dtype)
        return Cache(Columns.of(Tokens.none(batch_size, device), empty, empty))

    @one_operator
    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Cache | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`. With a state, every call's output equals the last rows of the whole prefix."""
        if choices is not None:
            raise Unsupported(self.name, "choices", "a pattern makes no discrete decisions", "choices=None")
        if state is not None and not self.causal and not self.cross:
            raise Unsupported(self.name, "state", "two-sided attention needs all tokens in one call", "causal=True")
        x, tokens = self.enter(x, tokens, state, source)
        tokens = self.mark(tokens)
        q = self._heads(self.to_q(x))
        if self.cross:
            cache = self._source_keys(state, source)
            out = self._attend_held(q, tokens, cache, shared=state is not None)
            new: Cache | None = cache
        else:
            q = self.scheme.rotate(q, tokens.position)
            out, new = self._attend_own(x, tokens, q, *self._own_keys(x, tokens), state)
        hidden = self.to_out(rearrange(out, "b h l d -> b l (h d)"))
        return Output(hidden, None if state is None else new, self.losses())

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Cache) -> Cache:
        """See `Attention`: keys and values alone."""
        x, tokens = self.enter(x, tokens, state, None)
        tokens = self.mark(tokens)
        return self._keep(self._append(state, tokens, *self._own_keys(x, tokens)), x.shape[1])

    def _own_keys(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self.scheme.rotate(self._heads(self.to_k(x)), tokens.position), self._heads(self.to_v(x))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", d=self.head_width)

    def _source_keys(self, state: Cache | None, source: Source | None) -> Cache:
        """Keys and values of the source, or those that the state has of it."""
        if source is None:
            assert state is not None
            (tokens,) = hold(state.columns.tokens)
            return state._replace(columns=state.columns._replace(fields=tokens))
        hidden, tokens = self.enter_source(source, kept=state is not None)
        return Cache(Columns.of(self.mark(tokens), self._heads(self.to_k(hidden)), self._heads(self.to_v(hidden))))

    def _attend_own(
        self, x: Tensor, tokens: Tokens, q: Tensor, k: Tensor, v: Tensor, state: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """Attend to the held keys and the call's own; the state that follows."""
        held = Cache(Columns.of(tokens, k, v)) if state is None else self._append(state, tokens, k, v)
        more = self._global_qkv(x, tokens, held.columns.filled)
        out = self._attend_held(q, tokens, held, more, shared=state is not None)
        return out, None if state is None else self._keep(held, x.shape[1])

    def _attend_held(
        self,
        q: Tensor,
        tokens: Tokens,
        cache: Cache,
        global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        shared: bool,
    ) -> Tensor:
        """Attend to the held keys; `shared`: with a state."""
        columns = cache.columns
        k, v = columns.held
        # all tokens are marked: those held were when they came
        call = PatternCall(
            self,
            q,
            k,
            v,
            tokens,
            columns.tokens,
            self.scale,
            self.bias_parameters(),
            global_qkv,
            columns,
            cache.globals,
        )
        out = self._run(call, self.kernel)
        return watch(out, call.keys) if shared else out

    def _run(self, call: PatternCall, kernel: str) -> Float[Tensor, "B H L D"]:
        if not (call.q.numel() and call.k.numel()):
            return zeros_for(call.q, (call.q, call.k, call.v))
        return choose(self.name, self.kernels, kernel, call).run(call)

    def _append(self, state: Cache, tokens: Tokens, k: Tensor, v: Tensor) -> Cache:
        held, late = state.columns, tokens.is_global & tokens.valid
        forgets = self.own_global or self.reach is not None
        if held.filled and forgets and bool(late.any()):
            self._refuse_late(held.tokens, tokens, late)
        columns = held.append(tokens, k, v, live=self._live, most=self.reach)
        return Cache(columns, self._list_globals(state, columns, tokens))

    def _keep(self, held: Cache, added: int) -> Cache:
        """The state after a call that brought `added` columns."""
        columns = held.columns.settle(added, live=self._live, most=self.reach)
        return Cache(columns, self._list_globals(held, columns))

    def _refuse_late(self, held: Tokens, tokens: Tokens, late: Tensor) -> None:
        """Global tokens in a document that earlier calls began: the keys that they must see may be forgotten."""
        continued = torch.where(held.valid, held.document, -1).amax(1)
        late = late & (tokens.document == continued[:, None])
        if not self.own_global:  # with projections of their own they need all of their keys in the call
            forgotten = (self._live(held) & held.valid).sum(1) < held.next_position
            late = late & forgotten[:, None]
        if bool(late.any()):
            raise Unsupported(
                self.name, "a global token after the first call", "keys that it must see are not kept",
                "global tokens in the first call",
            )  # fmt: skip

    def enter_source(self, source: Source, kept: bool = False) -> tuple[Tensor, Tokens]:
        """Hidden states of the source with padding zeroed, and its tokens, held; `kept`: by a state."""
        if source.hidden.ndim != 3 or source.hidden.shape[-1] != self.dim:
            raise ValueError(f"source.hidden must be [batch, length, {self.dim}], got {tuple(source.hidden.shape)}")
        (tokens,) = hold(source.tokens, kept=kept)
        return source.hidden.masked_fill(~tokens.valid[..., None], 0), tokens

    def _global_qkv(self, x: Tensor, tokens: Tokens, columns: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Longformer's second projection; only computed where a global query is there to use it.

        Args:
            columns: of keys, of which the call's own are the last. Those before it are zeros: a global query's document
                begins in its call (checked before), so it sees none of them.
        """
        if not self.own_global or not bool((tokens.is_global & tokens.valid).any()):
            return None
        q, k, v = (self._heads(project(x)) for project in (self.to_q_global, self.to_k_global, self.to_v_global))
        q, k = self.scheme.rotate(q, tokens.position), self.scheme.rotate(k, tokens.position)
        if earlier := columns - x.shape[1]:
            k, v = (nn.functional.pad(y, (0, 0, earlier, 0)) for y in (k, v))
        return q, k, v

    def _list_globals(self, before: Cache, columns: Columns, tokens: Tokens | None = None) -> Tensor | None:
        """Columns of global tokens, found again only where columns moved or such tokens came."""
        if not self.links_blocks or columns.version < 0:
            return None
        stayed = before.globals is not None and columns.fields is before.columns.fields
        if stayed and (tokens is None or not bool((tokens.is_global & tokens.valid).any())):
            return before.globals
        held = columns.tokens
        mask = held.is_global & held.valid
        column = torch.arange(columns.filled, device=mask.device)
        most = int(mask.sum(1).amax()) if len(mask) else 0
        return torch.where(mask, column, -1).topk(most, dim=1).values

    def _live(self, keys: Tokens) -> Bool[Tensor, "B S"]:
        """What the next token of each row can still see."""
        following = keys.next_position[:, None]
        last = torch.where(keys.valid, keys.document, -1).amax(1, keepdim=True)
        mask = keys.valid & (keys.document == last)
        if self.reach is not None:
            mask = mask & ((following - keys.position <= self.reach) | keys.is_global)
        return mask


def hide(seen: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 where seen, -inf elsewhere: a plain pattern's bias."""
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill(~seen, -torch.inf)
