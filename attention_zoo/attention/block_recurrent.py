"""Block-recurrent attention: a sliding window, and vectors that are handed from block to block. Hutchins et al. 2022.

A document is cut into blocks of W tokens, aligned to position 0. A token sees the W tokens before it, itself, and S
state vectors as the blocks before its own have left them. When a block is complete, the state looks at itself and at
the block's tokens and is renewed through a gate:

    vertical     y = W_o [softmax(q_x K_xᵀ) V_x ; softmax(q_xc K_cᵀ) V_c]     x: tokens in reach; c: the state before
    horizontal   h = [softmax(q_c K_cᵀ) V_c ; softmax(q_cx K_xᵀ) V_x]         x: the tokens of the block
    fixed gate   c <- c ⊙ g + z ⊙ (1 - g),   z = W_z h + b_z,   g = sigmoid(b)
    LSTM gate    c <- c ⊙ f + z ⊙ i,   z = tanh(W_z h + b_z),   f = sigmoid(W_f h + b_f + 1),
                                                                i = sigmoid(W_i h + b_i - 1)

Keys and values of tokens and of state vectors are each projected once and serve both directions; queries are four of
their own. The state is normalised, and an embedding of its own is added to each vector, before it is projected, so that
vectors that hold the same can come to hold different things. O(L · (W + S)) time and O(L) memory.

All windows are attended at once, by the kernels of a band, and so is the state by all tokens; only the state itself
goes from block to block, for all documents of all rows at once (layout/blocks.py, ops/recurrence).

Paper: §3. W = S = 512, at one layer of twelve (the tenth), T5's relative bias in the window, gradients through the
eight blocks of a training segment; "skip": the state's direction has no feed-forward layer, which the paper found best.

Released code (meliad, JAX): as the paper; keys and queries are normalised to length 1; the state looks at the block
before, too (its keys are those of the window); z of the LSTM gate has no tanh. The initial state and the gate's bias
are drawn with deviation 0.1, the embeddings of vectors with 1; as here.

Here: the gate is "skip", fixed or LSTM, by the paper's formulae. Scores are scaled by D^-0.5. The window takes the
positions of the house (`none`, `rotary`, `alibi`) instead of T5's; keys that the state sees are not rotated. Blocks
count the tokens of a document, not columns or calls: an open block waits in the state of decoding, for its tokens are
among the keys of the window. `truncate` says after how many blocks gradients stop.
Processes that share a row fetch the window's keys from their owners and attend to it all at once; only the state goes
from one to the next (attention/block_recurrent_placed.py).

When: something small must be carried far, at constant cost. Flip-flop (128 tokens, window and states 8, model=tiny, one
seed): accuracy 0.71 after 300 steps beside 0.67 of a window of 8, and 0.997 after 800 beside 0.63; RMT's copy task with
window=4 states=12: 0.18 beside 0.10. Not where much must be found again word for word, in little training: MQAR
anywhere (task.power=1) 0.06. Each block waits for the one before it, forward and
backward, but documents do not wait for each other. However few its tokens, a turn is some 38 small operators forward
and 49 backward (views included; tests/test_launches.py), of which 16 and 31 compute or copy; all together add 20 and
140 more, beside 60 and 40 of a call without one: of small windows and states these are what takes the time.

Checked: against a double loop over blocks and tokens in float64, outputs and gradients to 1e-11
(tests/references/block_recurrent.py); against the port block-recurrent-transformer-pytorch, outputs and gradients to
1e-9, once it has the mask of this window (its own shows the whole block before) and the sign of its gate is turned (it
weighs the new where the paper's weighs the old). Beside the port at 16,384 tokens: 1.3 times as fast. Both need about
as many FLOPs: here scores are computed again in backward, there twice the window is multiplied.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.block_recurrent_placed import output_in_place
from attention_zoo.attention.operator import one_operator
from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Attention, Output, Source, Tokens, at_least
from attention_zoo.layout.blocks import Turns, turns
from attention_zoo.layout.host import Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, none
from attention_zoo.layout.reach import Band
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.one_of import attend_to_one_of
from attention_zoo.ops.recurrence.recur import recur
from attention_zoo.ops.recurrence.turns import Course, Weights
from attention_zoo.ops.relative.projections import joined
from attention_zoo.ops.softmax.function import watch
from attention_zoo.ops.softmax.fused import fused
from attention_zoo.options import Positive
from attention_zoo.place import place_of
from attention_zoo.rules import OneOf


class BlockState(NamedTuple):
    """What a running layer holds.

    Fields:
        columns: keys, values and keys without their positions of the tokens in reach, the open block's among them.
        vectors: [B, S, E], the state that the next token of each row's document sees.
        k, v: [B, S, K, D], of the vectors.
    """

    columns: Columns
    vectors: Float[Tensor, "B S E"]
    k: Float[Tensor, "B S K D"]
    v: Float[Tensor, "B S K D"]


class BlockRecurrent(Attention):
    """A sliding window, and a recurrent state of vectors that is renewed after each block.

    Args:
        window: W, tokens of a block, and tokens before a token that it sees.
        states: S, vectors of the state.
        gate: fixed (one learned share for each feature, the paper's best) | lstm (of what the state has seen).
        truncate: gradients of the state stop at the border of so many blocks of a document; null: they go through all.
        kernel: of the window: auto | row | sdpa | short | flex | banded | xformers | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "block_recurrent"
    tiny = {"window": 4, "states": 3}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=False,
        global_tokens="none",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        positions=("none", "rotary", "alibi"),
        grouped_heads=True,
    )
    travels = "keys of the window by need, and the state, from each process to the next"
    hands_on = True

    def __init__(
        self,
        *,
        window: Positive = 512,
        states: Positive = 512,
        gate: Annotated[str, OneOf("fixed", "lstm")] = "fixed",
        truncate: Positive | None = None,
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(**shared)
        self.window, self.states, self.gate, self.truncate = window, states, gate, truncate
        self.local = Window(window=window, kernel=kernel, **shared)
        width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.to_q_of_state = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_out = nn.Linear(2 * width, self.dim, bias=self.bias_out)
        # the state's side
        self.initial = nn.Parameter(torch.empty(states, self.dim).normal_(std=0.1))
        self.identity = nn.Parameter(torch.empty(states, self.dim).normal_())
        self.state_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.state_q_of_tokens = nn.Linear(self.dim, width, bias=self.bias_into)
        self.state_k = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.state_v = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.state_out = nn.Linear(2 * width, self.dim, bias=self.bias_out)
        # open from the start: about half of the state is renewed by each block
        if gate == "fixed":
            self.keep = nn.Parameter(torch.empty(self.dim).normal_(std=0.1))
        else:
            self.forget_gate, self.input_gate = (nn.Linear(2 * width, self.dim) for _ in range(2))

    def pairs(self, length: int) -> float:
        """See `Attention`: the window, the state seen by all tokens, and what it sees itself of each complete block."""
        W, S = min(self.window, length), self.states
        near = W * (W + 1) / 2 + (length - W) * (self.window + 1)
        return float(near + length * S + max(0, (length - 1) // self.window) * S * (S + self.window))

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: the window, and the state."""
        return [float(min(at, self.window) + 1 + self.states) for at in range(length)]

    def oldest_seen(self, length: int) -> list[int]:
        """See `Attention`: the state has heard of all tokens."""
        return [0] * length

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`: of the window."""
        return self.local.explain_kernels(length, device, dtype)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return BlockState, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> BlockState:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, self.kv_heads, 0, self.head_width, device=device, dtype=dtype)
        columns = Columns.of(none(batch_size, device), *[empty] * (3 if self.local.rotates else 2))
        # of no document yet: the first token of each row begins one
        exact = torch.promote_types(dtype, torch.float32)
        shapes = (self.dim,), (self.kv_heads, self.head_width), (self.kv_heads, self.head_width)
        blank = (torch.zeros(batch_size, self.states, *shape, device=device, dtype=exact) for shape in shapes)
        return BlockState(columns, *blank)

    @one_operator
    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: BlockState | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`. With a state, every call's output equals the last rows of the whole prefix."""
        x, layout = self.enter(x, tokens, state, source, choices)
        if layout.placement is not None:
            return output_in_place(self, x, layout)
        near, columns = self.local.look(x, layout, None if state is None else state.columns)
        held = Host.plain(len(x), 0) if state is None else state.columns.ledger.host
        order = self._turns(layout, columns.tokens, held, state is not None)
        vectors, k, v = self._states(order, columns, state, len(x))
        q = self.local.heads_of(self.to_q_of_state(x))
        if order.held_alone:
            far = fused(q.to(k.dtype), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale).to(q.dtype)
            far = far if layout.asked is None else far.masked_fill(~layout.asked, 0)
        else:
            far = attend_to_one_of(q, k, v, order.which, block=self.window, scale=self.scale, asked=layout.asked)
        hidden = self.to_out(torch.cat([part.transpose(1, 2).flatten(2) for part in (near, far)], -1))
        if state is None:
            return Output(hidden)
        return Output(watch(hidden, columns.tokens), self._after(state, order, columns, layout, (vectors, k, v)))

    # --- the recurrence ----------------------------------------------------------------------------------------------

    def _turns(self, layout: Layout, keys: Layout, held: Host, keeps: bool) -> Turns:
        if keeps:
            return turns(layout, keys, held, self.window, keeps)
        return layout.plan(("turns", self.window), lambda: turns(layout, keys, held, self.window, keeps))

    def _states(
        self, order: Turns, columns: Columns, state: BlockState | None, batch: int
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """All states that somebody sees, in the order of their numbers: vectors [N, S, E], keys and values of them."""
        if order.held_alone:
            assert state is not None
            k, v = state.k, state.v
            if torch.is_grad_enabled() and k.is_inference():
                k, v = k.clone(), v.clone()  # autograd saves no tensor of inference mode
            return state.vectors, k, v
        return self.gone_through(order, columns, None if state is None else state.vectors)

    def gone_through(
        self, order: Turns, columns: Columns, held: Float[Tensor, "B S E"] | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """All states, as `_states`; `held`: what rows held before, None: nothing is kept."""
        # sums over many blocks are kept in float32 at least
        first = self.initial.to(torch.promote_types(self.initial.dtype, torch.float32))[None]
        if held is not None:
            first = torch.cat([first, held.to(first.dtype)])
        k, v = (self._blocks(each, order) for each in self.local.plain(columns))
        stops = None if self.truncate is None else (order.block + 1) % self.truncate == 0
        course = Course(order.counts, order.start, stops, self.scale, keeps=held is not None)
        k, v, vectors = recur(first, k, v, self._weights(first.dtype), course)
        return vectors, k, v

    def _weights(self, dtype: torch.dtype) -> Weights:
        gates = () if self.gate == "fixed" else (self.forget_gate, self.input_gate)
        return Weights(
            self.identity.to(dtype),
            *joined(self.dim, dtype, self.state_k, self.state_v, self.state_q, self.state_q_of_tokens),
            *joined(2 * self.heads * self.head_width, dtype, self.state_out, *gates),
            self.keep.to(dtype) if self.gate == "fixed" else None,
        )

    def _blocks(self, x: Tensor, order: Turns) -> Float[Tensor, "n K W D"]:
        """The tokens of the blocks, of all columns [B, K, S, D]; a view where blocks stand side by side in one row."""
        members = order.members.reshape(-1)
        if not len(members):
            return x.detach().new_empty(0, x.shape[1], self.window, x.shape[3])
        start = int(members[0]) if len(members) else 0
        if len(x) == 1 and bool((members == np.arange(start, start + len(members))).all()):
            found = x[0].narrow(1, start, len(members)).transpose(0, 1)
        else:
            found = x.transpose(1, 2).flatten(0, 1).index_select(0, tensor_of(members, x.device))
        return found.unflatten(0, (len(order.members), self.window)).transpose(1, 2)

    def _after(
        self, state: BlockState, order: Turns, columns: Columns, layout: Layout, states: tuple[Any, Tensor, Tensor]
    ) -> BlockState:
        """What is kept after a call."""
        kept = self.local.settle(columns, layout)
        if order.held_alone:
            return state._replace(columns=kept)
        chosen = tensor_of(order.last, layout.valid.device)
        return BlockState(kept, *(each.index_select(0, chosen) for each in states))


class Window(PatternAttention):
    """The window of a block-recurrent layer, whose keys and values the state shares; without a projection out of heads.

    Args:
        window: tokens before a token that it sees.
        kernel: see `PatternAttention`.
        shared: the options of `Attention`.
    """

    name = "block_recurrent"
    declared = BlockRecurrent.declared

    def __init__(self, *, window: Positive, kernel: str = "auto", **shared: Any):
        super().__init__(kernel=kernel, **shared)
        self.reach = Band(window, weights="uniform")
        self.window = window
        self.to_out = nn.Identity()  # type: ignore[assignment]

    @property
    def rotates(self) -> bool:
        """Whether keys with their positions are not the keys that the state sees."""
        return self.positions == "rotary"

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B 1 L S"]:
        gap = queries.position[:, :, None] - keys.position[:, None, :]
        return hide(gap.abs() <= self.window)[:, None]

    def look(self, x: Tensor, layout: Layout, held: Columns | None) -> tuple[Float[Tensor, "B H L D"], Columns]:
        """What tokens see of the window, and the columns that it was seen in."""
        q, new = self._heads(self.to_q(x)), self.own(x, layout)
        columns = Columns.of(layout, *new) if held is None else held.append(layout, *new, horizon=self._horizon)
        return self.seen(q, layout, columns), columns

    def own(self, x: Tensor, layout: Layout) -> tuple[Float[Tensor, "B K L D"], ...]:
        """Keys and values of tokens; and keys without positions, where those have some."""
        k, v = (self._heads(to(x)) for to in (self.to_k, self.to_v))
        turned = self.scheme.turn(k, layout)
        return (turned, v, k) if self.rotates else (k, v)

    def seen(self, q: Float[Tensor, "B H L D"], layout: Layout, columns: Columns) -> Float[Tensor, "B H L D"]:
        """What queries, not turned yet, see of the window in some columns, of which theirs are the last."""
        keys, values, *_ = columns.held
        q = self.scheme.turn(q, layout)
        call = PatternCall(self, q, keys, values, layout, columns.tokens, self.scale, columns=columns)
        return self._run(call, self.kernel)

    def plain(self, columns: Columns) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Keys without positions, and values."""
        keys, values, *more = columns.held
        return (more[0] if more else keys), values

    def settle(self, columns: Columns, layout: Layout) -> Columns:
        """The columns that are kept after a call."""
        return columns.settle(layout, horizon=self._horizon)[0]

    def heads_of(self, x: Float[Tensor, "B L HD"]) -> Float[Tensor, "B H L D"]:
        return self._heads(x)
