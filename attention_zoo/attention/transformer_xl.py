"""Segments with a memory, relative positions. Dai et al. 2019, "Transformer-XL", §3.2-3.3 and appendix A.

A document is cut into segments of S tokens, aligned to position 0. A token at p sees its own segment up to itself and
the M positions before that segment:

    keys(p)  = floor(p/S)·S - M ... p                    (same_length: p - M ... p)
    score_ij = scale · [(W_q x_i + u)·W_k h_j + (W_q x_i + v)·W_r R_{i-j}]
    h_j      = x_j inside the segment of i, stop_gradient(x_j) before it

Memory is hidden states, so W_k and W_v learn from it but earlier hidden states do not. R_d = [sin(d·f) || cos(d·f)],
f_i = 10000^(-2i/E), concatenated as in the released code; u and v are one pair a head, shared over depth (`untie_r`).

One call of any length equals the loop over segments, in outputs and gradients: what a loop would pass from segment to
segment are inputs of this same layer, and those are all there. So segments run at once, in O(L·(S+M)) time and O(L·E)
memory (ops/relative/chunks.py). Decoding projects the query into the space of hidden states instead of all keys out of
it.

Paper: as above; u and v are one pair for all layers, norms follow the addition. The memory is as long as the segment in
training and longer in evaluation.

Released code (torch; Hugging Face up to 4.35 follows it, but begins with memories of zeros, as the TensorFlow code and
its checkpoints): a call is a segment. Scores of all distances are computed and shifted into place by reshaping. There
are no biases in projections. `clamp_len` lets far distances count as one. `same_length` sees mem_len tokens, itself
among them, so that one slot of the memory is lost. With pre-norm, memories are kept before the norm.

Here: segments follow positions, not calls. Projections have a bias unless bias=False. `same_length` sees M tokens and
itself. A row begins with nothing to remember (`initial_memory="zeros"` is Hugging Face's), and distances are told apart
however far (`clamp_length`). Memories are kept as the layer received them: with pre-norm, behind the norm, whose gain
and bias learn from the own segment alone; outputs are the same. Dropout and norm belong to the skeleton.

Checked: against XLNet's relative attention and model, a double loop over queries and distances, the dense form of the
released code over several segments, and numbers that TransfoXL (transformers 4.35.2) gave for whole language models,
with memories shorter and longer than the segment, in tests/oracles/transformer_xl*.py. Largest error of one layer's
outputs and gradients 1e-6 in float32 and 3e-15 in float64; of whole models 4e-6 and 2e-14 (tests/oracles/README.md).
Other checkpoints: tests/test_weights_transformer_xl.py. Token by token: tests/references/transformer_xl.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.operator import refuse_export
from attention_zoo.attention.relative import RelativeAttention
from attention_zoo.attention.segment_plans import Lengths, plan_of, segments_of
from attention_zoo.contract import Operands, Output
from attention_zoo.layout.host import Array, Host
from attention_zoo.layout.kernel import choose
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon
from attention_zoo.layout.visible import runs_of
from attention_zoo.ops.relative.call import KERNELS, RelativeCall
from attention_zoo.ops.relative.chunks import ChunkPlan, relative_attention
from attention_zoo.ops.relative.few import few_of
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.ops.relative.projections import streams
from attention_zoo.ops.relative.short import is_short, short, short_or_chunked
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.options import Natural, Positive
from attention_zoo.rules import OneOf, Unsupported
from attention_zoo.tokens import Tokens


class TransformerXL(RelativeAttention):
    """Attention over the own segment and a memory of what came before it.

    A call with a state continues the documents of earlier calls, cut anywhere: outputs are those of the whole prefix.
    Gradients stop at the beginning of the call, so they equal those of one long call where cuts lie on segment borders.
    `segment_length`, `memory_length` and `same_length` may be changed on a built layer, such as to a longer memory in
    evaluation than in training; the state holds at least what was reachable when it was made.

    The state are `Columns`: the hidden states that the next token can still see, [B, N, E] as the layer received them,
    and in decoding a quarter more. They are detached: gradients never cross from one call into an earlier one.

    Args:
        segment_length: S, tokens per segment.
        memory_length: M, tokens visible before the own segment.
        same_length: every token sees exactly the last M tokens and itself, so that all have the same context. Which
            pairs pass gradients to hidden states still follows the segments.
        untie_r: give each layer its own u and v, instead of one pair shared over depth.
        clamp_length: distances above it count as it; None: they are told apart however far.
        initial_memory: what the first tokens of a row remember. "empty": nothing, they see fewer keys (the paper, and
            the released torch code). "zeros": M hidden states of zeros, which are seen like others (the released
            TensorFlow code and checkpoints, and Hugging Face); such a row is one document, from its beginning.
        kernel: auto | absorbed | triton | shift | gather. "absorbed" is for few queries and gives no gradients,
            "triton" needs CUDA, it and "shift" need tokens without holes, "gather" does everything. auto takes the
            first that fits.
        shared: the options of `Attention`. `positions` may be "none" or "relative", which mean the same here: this
            mechanism always has its own. `bias` does not concern W_r, which has none.
    """

    name = "transformer_xl"
    declared = replace(RelativeAttention.declared, adjustable=("segment_length", "memory_length", "same_length"))
    tiny = {"segment_length": 4, "memory_length": 3}
    kernels = KERNELS
    needs_columns = True
    blank: Tensor

    def __init__(
        self,
        *,
        segment_length: Positive = 512,
        memory_length: Natural = 512,
        same_length: bool = False,
        untie_r: bool = False,
        clamp_length: Positive | None = None,
        initial_memory: Annotated[str, OneOf("empty", "zeros")] = "empty",
        kernel: Annotated[str, OneOf("auto", "absorbed", "triton", "shift", "gather")] = "auto",
        **shared: Any,
    ):
        super().__init__(
            segment_length=segment_length, memory_length=memory_length, untie_r=untie_r, kernel=kernel, **shared
        )
        self.same_length = same_length
        self.clamp_length, self.starts_blank = clamp_length, initial_memory == "zeros"
        if self.starts_blank:
            # what a hidden state of zeros is to this layer: zeros, or with pre-norm what the norm makes of them
            self.register_buffer("blank", torch.zeros(self.dim))

    def pairs(self, length: int) -> float:
        """See `Attention`; a pair costs half as much again for its distance."""
        position = torch.arange(length)
        seen = (position - self._oldest(position).clamp(min=0) + 1).sum()
        return 1.5 * float(seen)

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: the segment so far, and its memory."""
        position = torch.arange(length)
        return (position - self._oldest(position).clamp(min=0) + 1).double().tolist()

    def oldest_seen(self, length: int) -> list[int]:
        """See `Attention`: the first of the segment's memory."""
        return self._oldest(torch.arange(length)).clamp(min=0).tolist()

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: a stretch that begins a segment, its memory in front and full, and keys of distances."""
        (H, D), S, M = (self.heads, self.head_width), self.segment_length, self.memory_length
        keys, seen = (batch, H, M + length, D), -(-M // S) * S
        return Operands(((batch, H, length, D), keys, keys, (S + M, H, D)), True, (self.u, self.v), seen)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Columns, self.dim

    def initial_state(self, batch_size: int) -> Columns:
        return self._nothing(batch_size)

    def _attended(self, q: Tensor, x: Tensor, layout: Layout, state: Columns | None = None) -> Output:
        self._check_lengths()
        q = self._heads(q)
        columns = self._append(x, layout, self._begun(state, x, layout) if self.starts_blank else state)
        hidden, keys = columns.held[0].to(x.dtype), columns.tokens
        if not x.shape[1]:  # a process may own no column, and takes part in what is fetched
            return Output(self.to_out(zeros_for(q, (q, hidden)).transpose(1, 2).flatten(2)))
        kernel = choose(self.name, KERNELS, self.kernel, self._call(x, keys, self._lowest)).name
        if kernel == "absorbed":
            key = ("few", x.shape[1], *self._lengths)
            few = keys.plan(key, lambda: few_of(keys, segments_of(keys, x.shape[1], self._lengths).first))
            out = self._absorbed(q, hidden, few)
        else:
            out = self._chunked(q, hidden, keys, kernel)
        out = out if state is None else watch(out, keys)
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return Output(out, None if state is None else self._settled(columns, layout))

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Columns) -> Columns:
        """See `Attention`: hidden states as they come."""
        x, layout = self.enter(x, tokens, state, None)
        held = self._begun(state, x, layout) if self.starts_blank else state
        return self._settled(self._append(x, layout, held), layout)

    # --- memory ----------------------------------------------------------------------------------------------------

    @property
    def _lowest(self) -> int:
        """The lowest position that there may be."""
        return -self.memory_length if self.starts_blank else 0

    @property
    def _horizon(self) -> Horizon:
        """What the next token of each row's current document can still see."""
        segment = 1 if self.same_length else self.segment_length
        return Horizon(self.memory_length, segment, most=self.memory_length + segment - 1)

    def _begun(self, state: Columns | None, x: Tensor, layout: Layout) -> Columns:
        """The state, with blank hidden states at the M positions before 0 where it is empty yet."""
        B, M, placement = len(x), self.memory_length, layout.placement
        # whether a row is one document is to be known of all of its columns, wherever they are
        new = layout.host if placement is None else placement.whole.host
        if state is None or not state.filled:
            column = new.valid.argmax(1)[:, None]

            def before_zero() -> Layout:
                document = np.broadcast_to(np.take_along_axis(new.document, column, 1), (B, M))
                return Layout.known(Host.plain(B, M, start=-M)._replace(document=document), x.device)

            blank = layout.plan(("before zero", M), before_zero)
            state = Columns.of(blank, self.blank.to(x.dtype).expand(B, M, -1))
        if M and bool((new.valid & (new.document != state.ledger.host.document[:, -1:])).any()):
            raise Unsupported(
                self.name, "initial_memory=zeros with several documents in a row", "only a row's first can begin so",
                "initial_memory=empty, or one document a row",
            )  # fmt: skip
        if placement is not None and not bool((layout.host.valid & (self._oldest(layout.host.position) < 0)).any()):
            return self._nothing(B)
        return state

    def _oldest_needed(self, position: Array) -> Array:
        return self._oldest(position)

    @property
    def _sees(self) -> tuple[Any, ...]:
        return ("transformer_xl", *self._lengths)

    # --- scores ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B H S D"],
        v: Float[Tensor, "B H S D"],
        r: Float[Tensor, "n H D"],
        keys: Tokens | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The mechanism on given queries, keys and values, with the layer's u and v but no projections.

        Whoever projects decides where gradients stop: k and v receive those of all pairs, memory included.

        Args:
            r: keys of the distances 0, 1, ...: as many as a query sees, or more; segment_length + memory_length do.
            keys: tokens of the S columns, of which the last L are the queries. Default all valid and one document, in
                which the first query begins a segment. Blank keys before position 0 are the caller's to give.
        """
        refuse_export(self.name)
        (B, H, L, D), S = q.shape, k.shape[2]
        if k.shape != v.shape or k.shape != (B, self.heads, S, self.head_width) or k.shape[1::2] != (H, D) or S < L:
            raise ValueError(
                f"q, k and v must be [batch, {self.heads}, length, {self.head_width}], with as many keys as queries or "
                f"more, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        self._check_lengths()
        start = (L - S) % self.segment_length
        keys = Layout.plain(B, S, q.device, start) if keys is None else Layout.of(keys)
        if keys.valid.shape != (B, S):
            raise ValueError(f"keys must have shape {(B, S)}, got {tuple(keys.valid.shape)}")
        seen = min(S, self.memory_length + (1 if self.same_length else self.segment_length))
        if r.shape[1:] != (H, D) or len(r) < seen:
            raise ValueError(f"r must be [at least {seen}, {H}, {D}], got {tuple(r.shape)}")
        if not (B and L):
            return zeros_for(q, (q, k, v, r, self.u, self.v))
        consecutive = keys.implied or runs_of(keys, self._lowest).consecutive
        call = RelativeCall(L, S, D, q.device, q.dtype, consecutive, wanted=self.kernel)
        plan = self._plan(keys, L, choose(self.name, KERNELS[1:], self.kernel, call).name)
        if len(r) != plan.distances:  # cutting and padding cost a copy of the table each, and one of its gradient
            hidden = max(0, plan.distances - len(r))  # distances of hidden pairs
            r = nn.functional.pad(r[: plan.distances], (0, 0, 0, 0, 0, hidden))
        given = RelativeOperands(q, k, v, k.detach(), v.detach(), r, self.u, self.v)
        return short_or_chunked(given, plan, scale=self.scale)

    def _chunked(self, q: Tensor, hidden: Tensor, keys: Layout, kernel: str) -> Float[Tensor, "B H L D"]:
        """Project all keys, then attend in chunks of queries."""
        plan = self._plan(keys, q.shape[2], kernel)
        if plan.apart:
            k, k_own = (self._heads(stream) for stream in streams(self.to_k, hidden))
            v, v_own = (self._heads(stream) for stream in streams(self.to_v, hidden))
        else:
            k, v = self._heads(self.to_k(hidden)), self._heads(self.to_v(hidden))
            k_own, v_own = k.detach(), v.detach()
        if is_short(q, k, plan):
            table = self.to_r(self._waves(plan.distances, falling=True)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            return short(RelativeOperands(q, k, v, k_own, v_own, table, self.u, self.v), scale=self.scale)
        r = rearrange(self.to_r(self._waves(plan.distances)), "n (h d) -> n h d", h=self.heads)
        return relative_attention(RelativeOperands(q, k, v, k_own, v_own, r, self.u, self.v), plan, scale=self.scale)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _oldest(self, position: Any) -> Any:
        """The oldest position that a token there sees; may be negative."""
        return self._lengths.oldest(position)

    @property
    def _lengths(self) -> Lengths:
        """All that says which keys a query sees."""
        return Lengths(self.segment_length, self.memory_length, self.same_length, self._lowest)

    def _plan(self, keys: Layout, length: int, kernel: str) -> ChunkPlan:
        """The queries in chunks."""
        return plan_of(keys, length, kernel, self._lengths)
