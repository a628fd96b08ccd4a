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
memory (ops/relative.py). Decoding projects the query into the space of hidden states instead of all keys out of it.

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

from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.contract import Abilities, Attention, Operands, Output, Source, Unsupported, at_least
from attention_zoo.ops.columns import Columns
from attention_zoo.ops.compiled import one_operator, refuse_export
from attention_zoo.ops.dispatch import triton_reason
from attention_zoo.ops.function import watch, zeros_for
from attention_zoo.ops.place import place_of
from attention_zoo.ops.projections import is_plain, streams
from attention_zoo.ops.relative import Plan, chunk_borders, plan_chunks, relative_attention
from attention_zoo.options import Natural, Positive
from attention_zoo.rules import OneOf
from attention_zoo.tokens import Tokens, hold, unshared

TABLE = 256
"""Tables of distances are made for a multiple of this many, so that growing calls share one."""


class Layout(NamedTuple):
    """Where the keys of each query lie.

    Fields:
        keys: tokens of the S columns; the last L are the queries.
        first, own: see `attention_zoo.ops.relative.Plan`.
        run: which run of one document each column belongs to, counted from 1; 0 before the first.
        aligned: whether within each document columns stand as positions do.
    """

    keys: Tokens
    first: Int[Tensor, "B L"]
    own: Int[Tensor, "B L"]
    run: Int[Tensor, "B S"]
    aligned: bool


class TransformerXL(Attention):
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
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=False,
        global_tokens="none",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        positions=("none", "relative"),
        adjustable=("segment_length", "memory_length", "same_length"),
        truncated=True,
    )
    tiny = {"segment_length": 4, "memory_length": 3}
    blank: Tensor
    shared_over_depth: tuple[str, ...] = ("u", "v")
    """Parameters that a stack ties over its layers of this kind."""

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
        super().__init__(**shared)
        if self.dim % 2:
            raise ValueError(f"dim must be even for sines and cosines of distances, got {self.dim}")
        self.segment_length, self.memory_length, self.same_length = segment_length, memory_length, same_length
        self._check_lengths()
        self.clamp_length, self.starts_blank = clamp_length, initial_memory == "zeros"
        if self.starts_blank:
            # what a hidden state of zeros is to this layer: zeros, or with pre-norm what the norm makes of them
            self.register_buffer("blank", torch.zeros(self.dim))
        self.kernel = kernel
        if untie_r:
            self.shared_over_depth = ()
        width = self.heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_r = nn.Linear(self.dim, width, bias=False)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)
        self.u = nn.Parameter(torch.empty(self.heads, self.head_width).normal_(std=0.02))
        self.v = nn.Parameter(torch.empty(self.heads, self.head_width).normal_(std=0.02))

    def _check_lengths(self) -> None:
        """At every call too: they are adjustable."""
        at_least(1, segment_length=self.segment_length)
        at_least(0, memory_length=self.memory_length)

    def pairs(self, length: int) -> float:
        """See `Attention`; a pair costs half as much again for its distance."""
        position = torch.arange(length)
        seen = (position - self._oldest(position).clamp(min=0) + 1).sum()
        return 1.5 * float(seen)

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: a stretch that begins a segment, its memory in front and full, and keys of distances."""
        (H, D), S, M = (self.heads, self.head_width), self.segment_length, self.memory_length
        keys, seen = (batch, H, M + length, D), -(-M // S) * S
        return Operands(((batch, H, length, D), keys, keys, (S + M, H, D)), True, (self.u, self.v), seen)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Columns, self.dim

    def initial_state(self, batch_size: int) -> Columns:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, 0, self.dim, device=device, dtype=dtype)
        return Columns.of(Tokens.none(batch_size, device), empty)

    @one_operator
    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Columns | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`."""
        if choices is not None:
            raise Unsupported(self.name, "choices", "it makes no discrete decisions", "choices=None")
        self._check_lengths()
        x, tokens = self.enter(x, tokens, state, source)
        columns = self._append(x, tokens, state)
        hidden = columns.held[0].to(x.dtype)
        layout = self._layout(columns.tokens, x.shape[1])
        out = self._absorbed(x, hidden, layout) if self._is_absorbed(x) else self._chunked(x, hidden, layout)
        out = out if state is None else watch(out, layout.keys)
        out = self.to_out(rearrange(out, "b h l d -> b l (h d)"))
        return Output(out, None if state is None else self._keep(columns, x.shape[1]))

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Columns) -> Columns:
        """See `Attention`: hidden states as they come."""
        x, tokens = self.enter(x, tokens, state, None)
        return self._keep(self._append(x, tokens, state), x.shape[1])

    def _append(self, x: Tensor, tokens: Tokens, state: Columns | None) -> Columns:
        held = self._begun(state, x, tokens) if self.starts_blank else state
        return Columns.of(tokens, x) if held is None else held.append(tokens, x, live=self._live, most=self._most)

    def _keep(self, columns: Columns, added: int) -> Columns:
        columns = columns._replace(buffers=(columns.buffers[0].detach(),))
        return columns.settle(added, live=self._live, most=self._most)

    def _begun(self, state: Columns | None, x: Tensor, tokens: Tokens) -> Columns:
        """The state, with blank hidden states at the M positions before 0 where it is empty yet."""
        B, M = len(x), self.memory_length
        if state is None or not state.filled:
            column = tokens.valid.long().argmax(1, keepdim=True)
            held = Tokens.all_valid(B, M, x.device)._replace(
                document=tokens.document.gather(1, column).expand(B, M),
                position=torch.arange(-M, 0, device=x.device).expand(B, M),
            )
            state = Columns.of(held, self.blank.to(x.dtype).expand(B, M, -1))
        if M and bool((tokens.valid & (tokens.document != state.tokens.document[:, -1:])).any()):
            raise Unsupported(
                self.name, "initial_memory=zeros with several documents in a row", "only a row's first can begin so",
                "initial_memory=empty, or one document a row",
            )  # fmt: skip
        return state

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
        if keys is None:
            valid = torch.ones(B, S, dtype=torch.bool, device=q.device)
            keys = unshared(Tokens.of(valid, start=(L - S) % self.segment_length))
        (keys,) = hold(keys)
        if keys.valid.shape != (B, S):
            raise ValueError(f"keys must have shape {(B, S)}, got {tuple(keys.valid.shape)}")
        seen = min(S, self.memory_length + (1 if self.same_length else self.segment_length))
        if r.shape[1:] != (H, D) or len(r) < seen:
            raise ValueError(f"r must be [at least {seen}, {H}, {D}], got {tuple(r.shape)}")
        if not (B and L):
            return zeros_for(q, (q, k, v, r, self.u, self.v))
        plan = self._plan(self._layout(keys, L), q.dtype)
        if len(r) != plan.distances:  # cutting and padding cost a copy of the table each, and one of its gradient
            hidden = max(0, plan.distances - len(r))  # distances of hidden pairs
            r = nn.functional.pad(r[: plan.distances], (0, 0, 0, 0, 0, hidden))
        own = (k.detach(), v.detach())
        return relative_attention(q, k, v, *own, r, self.u, self.v, plan, scale=self.scale)

    def _chunked(self, x: Tensor, hidden: Tensor, layout: Layout) -> Float[Tensor, "B H L D"]:
        """Project all keys, then attend in chunks of queries."""
        q = self._heads(self.to_q(x))
        plan = self._plan(layout, q.dtype)
        k, k_own = (self._heads(stream) for stream in streams(self.to_k, hidden))
        v, v_own = (self._heads(stream) for stream in streams(self.to_v, hidden))
        r = rearrange(self.to_r(self._waves(plan.distances)), "n (h d) -> n h d", h=self.heads)
        return relative_attention(q, k, v, k_own, v_own, r, self.u, self.v, plan, scale=self.scale)

    def _is_absorbed(self, x: Tensor) -> bool:
        """Whether this call is for the "absorbed" kernel: it spends E per pair and head where the others spend D."""
        if self.kernel == "absorbed" and torch.is_grad_enabled():
            raise Unsupported(self.name, "kernel=absorbed", "it gives no gradients", "torch.no_grad() or kernel=auto")
        if not all(map(is_plain, (self.to_k, self.to_v, self.to_r))):
            if self.kernel != "absorbed":
                return False
            raise Unsupported(
                self.name, "kernel=absorbed", "it multiplies by the matrices of to_k, to_v and to_r, one of which is "
                "wrapped, hooked or no nn.Linear", "kernel=auto",
            )  # fmt: skip
        few = 4 * x.shape[1] <= self.head_width and not torch.is_grad_enabled()
        return self.kernel == "absorbed" or (self.kernel == "auto" and few)

    def _absorbed(self, x: Tensor, hidden: Tensor, layout: Layout) -> Float[Tensor, "B H L D"]:
        """Few queries meet the hidden states themselves: q · (W h) = (Wᵀ q) · h, and W mixes values after the sum."""
        keys, length = layout.keys, x.shape[1]
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            to_k, to_r, to_v = (
                rearrange(layer.weight.to(exact), "(h d) e -> h d e", h=self.heads)
                for layer in (self.to_k, self.to_r, self.to_v)
            )
            q = self._heads(self.to_q(x.to(place_of(self)[1]))).to(exact)
            states = hidden.to(exact)[:, None]
            column = torch.arange(hidden.shape[1], device=x.device)
            seen = (column >= layout.first[..., None]) & (column <= column[-length:, None]) & keys.valid[:, None]
            distance = (keys.position[:, -length:, None] - keys.position[:, None]).masked_fill(~seen, 0)
            waves = self._waves(int(distance.amax()) + 1).to(exact)
            # the bias of keys adds the same to all scores of a query: softmax does not see it
            content = ((q + self.u[:, None]) @ to_k) @ states.transpose(-1, -2)
            place = ((q + self.v[:, None]) @ to_r) @ waves.T
            scores = content + place.gather(-1, distance[:, None].expand_as(content))
            scores = (scores * self.scale).masked_fill(~seen[:, None], -torch.inf)
            weights = scores.softmax(-1).masked_fill(~seen[:, None], 0)  # padding sees nothing: softmax gives NaN
            out = (weights @ states) @ to_v.transpose(-1, -2)
            if self.to_v.bias is not None:
                out = out + rearrange(self.to_v.bias, "(h d) -> h 1 d", h=self.heads)
            return out.to(x.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", h=self.heads)

    def _oldest(self, position: Tensor) -> Tensor:
        """The oldest position that a token there sees; may be negative."""
        start = position if self.same_length else position - position % self.segment_length
        return start - self.memory_length

    def _waves(self, distances: int) -> Float[Tensor, "n E"]:
        """R of the distances from 0 on; one table serves many calls."""
        device, dtype = place_of(self)
        rounded = -(-distances // TABLE) * TABLE
        return _table(rounded, self.dim, self.clamp_length, dtype, device)[:distances]

    def _layout(self, keys: Tokens, length: int) -> Layout:
        """Find the first key of each query and of its segment, by binary search over (document, position)."""
        lowest = -self.memory_length if self.starts_blank else 0
        position, valid = keys.position, keys.valid
        columns = position.shape[1]
        column = torch.arange(columns, device=position.device).expand_as(position)
        newest = torch.where(valid, column, -1).cummax(1).values
        before = nn.functional.pad(newest[:, :-1], (1, 0), value=-1)
        previous = before.clamp(min=0)
        follows = valid & (before >= 0) & (keys.document == keys.document.gather(1, previous))
        step = position - position.gather(1, previous)
        aligned = ~follows | ((before == column - 1) & (step == 1))
        rising, aligned = torch.stack([(~follows | (step > 0)).all(), aligned.all()]).tolist()
        if not rising:
            raise ValueError("tokens.position must strictly increase over the valid tokens of a document")

        run = (valid & ~follows).long().cumsum(1)
        stride = torch.where(valid, position, 0).amax() + 1 - lowest
        place = torch.where(valid, run * stride + position - lowest, -1).cummax(1).values
        asked = slice(columns - length, None)
        at, base = torch.where(valid, position, 0)[:, asked], (run * stride)[:, asked]
        border = at - at % self.segment_length
        first, own = (
            torch.searchsorted(place, base + start.clamp(min=lowest) - lowest) for start in (self._oldest(at), border)
        )
        nothing = column[:, asked] + 1
        first, own = (torch.where(valid[:, asked], found, nothing) for found in (first, own))
        return Layout(keys, first, own, run, aligned)

    def _plan(self, layout: Layout, dtype: torch.dtype) -> Plan:
        """Choose the kernel and cut the queries into chunks."""
        if self.kernel == "shift" and not layout.aligned:
            raise Unsupported(
                self.name, "kernel=shift", "columns are not positions here (holes, or forgotten tokens)",
                "kernel=auto or gather",
            )  # fmt: skip
        reason = None if self.kernel in ("auto", "triton") else "another kernel is asked for"
        reason = reason or self._refuse_triton(layout, dtype)
        if self.kernel == "triton" and reason:
            raise Unsupported(self.name, "kernel=triton", reason, "kernel=auto")
        if reason is None:
            # no pair is farther apart than this, and no need to wait for the device to say by how much
            farthest = self.memory_length + (1 if self.same_length else self.segment_length)
            distances = min(layout.keys.position.shape[1], farthest)
            return Plan(layout.first, layout.own, (), distances, None, None, triton=True)
        gather = self.kernel == "gather" or not layout.aligned
        keys, length = layout.keys, layout.first.shape[1]
        columns = keys.position.shape[1]
        # chunks follow the segments of the first row: its queries need no key that its own segment does not
        query = int(keys.valid[0, columns - length :].long().argmax())
        phase = int(keys.position[0, columns - length + query]) - query
        borders = chunk_borders(length, self.segment_length, phase)
        more = {"position": keys.position, "valid": keys.valid} if gather else {}
        return plan_chunks(layout.first, layout.own, borders, columns, **more)

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`."""
        few = "it is for few queries, and gives no gradients"
        return [("absorbed", few), ("triton", self._refuse_device(device, dtype)), ("shift", None), ("gather", None)]

    def _refuse_triton(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """Why the Triton kernel cannot run this call, or None."""
        reason = self._refuse_device(layout.first.device, dtype)
        if reason is None and not layout.aligned:
            reason = "columns are not positions here (holes, or forgotten tokens)"
        return reason

    def _refuse_device(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := triton_reason(device):
            return reason
        from attention_zoo.ops.triton_relative import refuse

        return refuse(self.head_width, dtype)

    @property
    def _most(self) -> int:
        """How many tokens before it a token can see."""
        return self.memory_length + (0 if self.same_length else self.segment_length - 1)

    def _live(self, keys: Tokens) -> Bool[Tensor, "B S"]:
        """What the next token of each row's current document can still see."""
        oldest = self._oldest(keys.next_position)[:, None]
        last = torch.where(keys.valid, keys.document, -1).amax(1, keepdim=True)
        return keys.valid & (keys.document == last) & (keys.position >= oldest)


@lru_cache(maxsize=8)
def _table(distances: int, width: int, clamp: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R: sines, then cosines, of the distances from 0 on, [n, E]. Do not modify."""
    # it may be asked for first where tensors are born unfit for gradients
    with torch.inference_mode(False):
        # angles in float32 at least: bfloat16 cannot count past 256
        exact = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, width, 2, device=device, dtype=exact) / width
        distance = torch.arange(distances, device=device, dtype=exact)
        if clamp is not None:
            distance = distance.clamp(max=clamp)
        angle = distance[:, None] * 10_000.0**-exponent
        return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)
