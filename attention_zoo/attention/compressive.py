"""Segments with a memory, and a coarser memory of what falls out of it. Rae et al. 2019, "Compressive Transformers".

A document is cut into segments of S tokens, aligned to position 0. A token sees its own segment up to itself, the M
positions before it, and the last C of the groups of c tokens that lie before those, each as one compressed state:

    m        = floor((s·S - M) / c)·c, or 0              where the memory of segment s = floor(p/S) begins
    keys(p)  = z_{m/c - C} ... z_{m/c - 1} | h_m ... h_{s·S - 1} | x_{s·S} ... x_p
    z_g      = f(h_{g·c} ... h_{g·c + c - 1})            f: mean, max, conv, dilated, most_used
    score_ij = scale · [(W_q x_i + u)·W_k h_j + (W_q x_i + v)·W_r R_{i-j}]       i, j: columns of the table above
    loss     = sum ‖attn(h_s, evicted) - attn(h_s, f(evicted))‖² / tokens        of segments whose end evicts

So a compressed state counts as one column before the memory, as in the paper. h and z are detached: weights learn from
memories, earlier states do not. The loss alone teaches f: states and the weights of attention are detached in it.
attn has no positions: softmax(scale · (W_q h)·(W_k m)) W_v m, heads side by side, not yet projected out.

All segments of a call run at once, since what a loop would hand from one to the next are inputs of this layer: on a
CPU those of one size, by a Triton kernel (ops/relative/gathered.py) those of any, in as many operators for many as for
two. O(L·(S + M + C)) time, O(L·E) memory (ops/relative/segments.py). Decoding projects the query, not the keys, and
holds M + S + c - 1 hidden and C compressed states.

Paper: as above, S = M = 512 to 1,024 and C up to 4,096 at c = 2 to 4; best was convolution with this loss.

Released code: none. lucidrains' port (compressive-transformer-pytorch 0.4.0) detaches to_kv in place, so that it never
learns again after the first overflow, and takes its loss over all memory instead of what is evicted.

Several processes that share a row fetch the hidden states that all of this is made of, and compress them again.

Here: segments follow positions, not calls, and groups the tokens of a document: cuts, padding and packing change
nothing. Only whole groups leave memory: with S or M no multiple of c, memory is up to c - 1 tokens longer than M.
"dilated" is one convolution with c taps, every other token, stride c. "most_used" keeps the n/c states of the n evicted
ones that receive most of the attention attn(h_s, evicted) of the segment that evicts them, in their order; the paper
averages the attention of all that saw them. The loss is a mean over widths and over all tokens of the call, of which
those of segments that evict nothing count 0: so the losses of calls, rows and processes add up by their tokens. It is
there only where f learns and gradients are enabled.

When: evidence lies farther back than a memory may, and its gist will do. Two layers of width 64, S = M = 8, C = 24,
c = 2: needle (800 steps, one seed) 61.0 %, Transformer-XL 8.6 % (chance 6.3 %); flip_flop (150 steps, three seeds) 61
to 97 % and 59 to 67 %. Not where tokens must be found exactly, which compression blurs, and M may be as long as M and
C together: copy (300 steps, one seed) 2.3 %, Transformer-XL with M = 32 95.3 % (chance 1.6 %).

    python -m experiments.train task=copy steps=300 model=tiny threads=1 attention=compressive \\
      attention.segment_length=8 attention.memory_length=8 attention.compressed_length=24 attention.ratio=2
    python -m experiments.train task=copy steps=300 model=tiny threads=1 attention=transformer_xl \\
      attention.segment_length=8 attention.memory_length=32

Checked: against compressive-transformer-pytorch's attention over segments, outputs, loss and gradients (largest error
9e-15 in float64, 2e-6 in float32; tests/oracles/compressive.py), and token by token in float64, memories and loss
included (tests/references/compressive.py, tests/test_compressive.py).
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.attention.compressive_functions import LEARNED, Compression, used_most
from attention_zoo.attention.compressive_loss import squares
from attention_zoo.attention.compressive_lots import lots_of
from attention_zoo.attention.compressive_plans import Picked, Sizes, Slots, few_of, picked_of, pieces_of, slots_of
from attention_zoo.attention.operator import refuse_export
from attention_zoo.attention.relative import RelativeAttention
from attention_zoo.contract import Operands, Output
from attention_zoo.layout.host import Array
from attention_zoo.layout.kernel import choose, triton_reason
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, gathered, none
from attention_zoo.ops.relative.call import SEGMENTS, RelativeCall
from attention_zoo.ops.relative.gathered import LotPlan, gathered_attention
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.ops.relative.projections import streams, streams_of_several
from attention_zoo.ops.relative.segments import segment_attention
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.options import Natural, NonNegative, Positive
from attention_zoo.rules import OneOf
from attention_zoo.tokens import Tokens


class Memories(NamedTuple):
    """What the next token can still see, detached.

    Fields:
        columns: hidden states, [B, N, E] as the layer received them.
        slots: compressed ones, [B, G, E]; positions are numbers of groups.
    """

    columns: Columns
    slots: Columns


class Compressive(RelativeAttention):
    """Attention over the own segment, a memory before it, and compressed states before that.

    A call with a state continues the documents of earlier calls, cut anywhere: outputs are those of the whole prefix.
    Gradients stop at the beginning of the call, so they equal those of one long call where cuts lie on segment borders.
    `segment_length` and `memory_length` may be changed on a built layer; only "most_used" compresses differently then.

    `Output.losses` has "reconstruction", where segments end in the call that push groups out of memory.

    Args:
        segment_length: S, tokens per segment.
        memory_length: M, tokens visible before the own segment.
        compressed_length: C, compressed states visible before the memory; 0: none are made.
        ratio: c, tokens of a group, which become one compressed state.
        compression: mean | max | conv | dilated | most_used.
        reconstruction: factor on the loss of conv and dilated, which learn from nothing else; 0: they stay as drawn.
        untie_r: give each layer its own u and v, instead of one pair shared over depth.
        kernel: auto | absorbed | triton | segments. "absorbed" is for few queries and gives no gradients, "segments"
            does everything. auto takes the first that fits.
        shared: the options of `Attention`. `positions` may be "none" or "relative", which mean the same here. `bias`
            does not concern W_r, which has none.
    """

    name = "compressive"
    kernels = SEGMENTS
    tiny = {"segment_length": 4, "memory_length": 3, "compressed_length": 3, "ratio": 2}
    token_losses = ("reconstruction",)

    def __init__(
        self,
        *,
        segment_length: Positive = 256,
        memory_length: Natural = 256,
        compressed_length: Natural = 128,
        ratio: Positive = 4,
        compression: Annotated[str, OneOf("mean", "max", "conv", "dilated", "most_used")] = "conv",
        reconstruction: NonNegative = 1.0,
        untie_r: bool = False,
        kernel: Annotated[str, OneOf("auto", "absorbed", "triton", "segments")] = "auto",
        **shared: Any,
    ):
        super().__init__(
            segment_length=segment_length, memory_length=memory_length, untie_r=untie_r, kernel=kernel, **shared
        )
        self.compressed_length, self.ratio = compressed_length, ratio
        self.compression, self.reconstruction = compression, reconstruction
        self.compress = Compression(compression, self.dim, ratio)

    @property
    def _sizes(self) -> Sizes:
        self._check_lengths()
        return Sizes(self.segment_length, self.memory_length, self.ratio, self.compressed_length)

    def pairs(self, length: int) -> float:
        """See `Attention`; a pair costs half as much again for its distance."""
        position = torch.arange(length).numpy()
        memory = self._sizes.memory_from(position // self.segment_length)
        slots = (memory // self.ratio).clip(max=self.compressed_length)
        return 1.5 * float((position - memory + 1 + slots).sum())

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: tokens, and compressed states."""
        position = torch.arange(length).numpy()
        memory = self._sizes.memory_from(position // self.segment_length)
        slots = (memory // self.ratio).clip(max=self.compressed_length)
        return [float(each) for each in position - memory + 1 + slots]

    def oldest_seen(self, length: int) -> list[int] | None:
        """See `Attention`: the first token of the oldest compressed state; dilated ones reach on, and say nothing."""
        if self.compression == "dilated":
            return None
        position = torch.arange(length).numpy()
        memory = self._sizes.memory_from(position // self.segment_length)
        slots = (memory // self.ratio).clip(max=self.compressed_length)
        return [int(each) for each in memory - slots * self.ratio]

    def made_of(self, x: Float[Tensor, "1 L E"], tokens: Layout) -> Int[Tensor, "G m"]:
        """See `Attention`: what compressed states are made of, then the tokens."""
        before = tokens.plan("no slots", lambda: none(1, tokens.valid.device).layout)
        slots = slots_of(tokens, before, self._sizes, LEARNED.get(self.compression, 1))
        taps = slots.taps[0] if slots.missing is None else slots.taps[0].masked_fill(slots.missing[0], -1)
        if self.compression == "most_used":
            taps = self._used_most(x, slots, tokens)[0, :, None]
        place = torch.arange(tokens.valid.shape[1], device=taps.device)[:, None]
        return torch.cat([taps, nn.functional.pad(place, (0, taps.shape[1] - 1), value=-1)])

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: a document from its beginning, its compressed states, and keys of distances."""
        (H, D), sizes = (self.heads, self.head_width), self._sizes
        keys, slots = (batch, H, length, D), (batch, H, self._compressed(length), D)
        farthest = sizes.segment + sizes.memory + sizes.ratio + sizes.slots
        return Operands((keys, keys, keys, slots, slots, (farthest, H, D)), True, (self.u, self.v))

    def _compressed(self, length: int) -> int:
        """How many states of a document are compressed."""
        sizes = self._sizes
        known = torch.tensor([length // sizes.segment]).numpy()
        return sizes.memory_from(known).item() // sizes.ratio if sizes.slots else 0

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Memories, self.dim

    def initial_state(self, batch_size: int) -> Memories:
        return Memories(self._nothing(batch_size), self._nothing(batch_size))

    def _attended(self, q: Tensor, x: Tensor, layout: Layout, state: Memories | None = None) -> Output:
        sizes, L = self._sizes, x.shape[1]
        columns = self._append(x, layout, None if state is None else state.columns)
        hidden, keys = columns.held[0].to(x.dtype), columns.tokens
        if not L:  # a process may own no column, and takes part in what is fetched
            return Output(self.to_out(zeros_for(q, (q, hidden))))
        slots, states = self._slots(hidden, keys, state)
        table = torch.cat([states.detach(), hidden], 1) if states.shape[1] else hidden
        losses: dict[str, Tensor] = {}
        q = self._heads(q)
        kernel = self._kernel(x, keys, slots.layout)
        if kernel == "absorbed":
            few = few_of(keys, slots.layout, L, sizes)
            out = self._absorbed(q.transpose(1, 2), table, few).transpose(1, 2)
        else:
            out, k, v = self._segments(kernel, q, table, keys, slots.layout)
            if self.reconstruction and not self.compress.frozen():
                losses = self._reconstruction(q, k, v, hidden, states, slots, layout)
        out = out if state is None else watch(out, keys)
        out = self.to_out(out.flatten(2))
        return Output(out, None if state is None else self._keep(columns, slots, states, layout), losses)

    def _kernel(self, x: Tensor, keys: Layout, slots: Layout) -> str:
        call = self._call(x, keys, gathered=lambda: self._lots(keys, slots, x.shape[1]))
        return choose(self.name, SEGMENTS, self.kernel, call).name

    def _lots(self, keys: Layout, slots: Layout, queries: int) -> LotPlan | str:
        return lots_of(keys, slots, queries, self._sizes, heads=self.heads, head_width=self.head_width)

    def _segments(
        self, kernel: str, q: Float[Tensor, "B L H D"], table: Float[Tensor, "B T E"], keys: Layout, slots: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries see of the table of slots and tokens, and its keys and values, [B, T, H, D]."""
        L = q.shape[1]
        if kernel == "triton":
            lots = self._lots(keys, slots, L)
            assert isinstance(lots, LotPlan)  # it was chosen
            kv, own = (
                each.unflatten(-1, (2, self.heads, -1)) for each in streams_of_several(table, self.to_k, self.to_v)
            )
            out = gathered_attention(
                q, kv, own, self._distances(lots.distances), self.u, self.v, lots, scale=self.scale
            )
            k, v = kv.detach().unbind(2)
            return out, k, v
        plan = pieces_of(keys, slots, L, self._sizes, together=triton_reason(q.device) is None)
        k, k_own = map(self._heads, streams(self.to_k, table))
        v, v_own = map(self._heads, streams(self.to_v, table))
        given = RelativeOperands(q, k, v, k_own, v_own, self._distances(plan.distances), self.u, self.v)
        return segment_attention(given, plan, scale=self.scale), k, v

    def _distances(self, count: int) -> Float[Tensor, "n H D"]:
        return self._heads(self.to_r(self._waves(count)))

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Memories) -> Memories:
        """See `Attention`: hidden states as they come, and what they push out."""
        x, layout = self.enter(x, tokens, state, None)
        columns = self._append(x, layout, state.columns)
        slots, states = self._slots(columns.held[0].to(x.dtype), columns.tokens, state)
        return self._keep(columns, slots, states, layout)

    # --- memories --------------------------------------------------------------------------------------------------

    def _oldest_needed(self, position: Array) -> Array:
        """See `RelativeAttention`: what the oldest compressed state in sight is made of, for it is made here again."""
        sizes, taps = self._sizes, LEARNED.get(self.compression, 1)
        memory = sizes.memory_from(position // sizes.segment)
        group = (memory // sizes.ratio - sizes.slots).clip(min=0)
        if self.compression != "most_used":
            return group * sizes.ratio - (sizes.ratio - 1) * (taps - 1)
        # which states of a group are kept, all that leave memory together decide, and the segment that pushes them out
        evicting = sizes.evicting(group)
        return np.where(group * sizes.ratio < memory, sizes.memory_from(evicting), memory)

    @property
    def _sees(self) -> tuple[Any, ...]:
        return ("compressive", self._sizes, self.compression)

    @property
    def _horizon(self) -> Horizon:
        """What the next token of each row's current document can still see, and what will be compressed."""
        wider = (self.ratio - 1) * LEARNED.get(self.compression, 1)
        span = self.memory_length + wider
        return Horizon(span, self.segment_length, most=span + self.segment_length - 1)

    def _slots(
        self, hidden: Float[Tensor, "B N E"], keys: Layout, state: Memories | None
    ) -> tuple[Slots, Float[Tensor, "B G E"]]:
        """The compressed states that are held, then those that the call makes, which carry gradients of f alone."""
        B = len(hidden)
        before = keys.plan("no slots", lambda: none(B, hidden.device).layout) if state is None else state.slots.tokens
        slots = slots_of(keys, before, self._sizes, LEARNED.get(self.compression, 1))
        held = None if state is None else state.slots.held[0].to(hidden.dtype)
        if not slots.new:
            return slots, hidden[:, :0].detach() if held is None else held
        used_most = self.compression == "most_used"
        made = (
            gathered(hidden.detach(), self._used_most(hidden, slots, keys)) if used_most else self._made(hidden, slots)
        )
        made = made.to(hidden.dtype)
        return slots, made if held is None else torch.cat([held, made], 1)

    def _made(self, hidden: Float[Tensor, "B N E"], slots: Slots) -> Float[Tensor, "B new E"]:
        taps = slots.taps.flatten(1)
        found = gathered(hidden.detach(), taps).unflatten(1, slots.taps.shape[1:])
        made: Tensor = self.compress(found, slots.missing)
        return made

    def _keep(self, columns: Columns, slots: Slots, states: Tensor, layout: Layout) -> Memories:
        kept = states.detach() if slots.kept is None else gathered(states.detach(), slots.kept)
        return Memories(self._settled(columns, layout), Columns.of(slots.kept_layout, kept))

    # --- what is lost ----------------------------------------------------------------------------------------------

    def _reconstruction(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, states: Tensor, slots: Slots, layout: Layout
    ) -> dict[str, Tensor]:
        """How far attention to the new compressed states is from that to what they are made of.

        Of a process that has some of a sequence, its share of the mean: the segments that end there.
        """
        evicted, read = self._evicted(slots, hidden.shape[1], layout)
        if not evicted:
            return {} if layout.placement is None else {"reconstruction": q.new_zeros(())}
        G, new = states.shape[1], slots.new
        if q.shape[1] < hidden.shape[1]:  # the segment began in an earlier call
            with torch.no_grad():
                q = self._heads(self.to_q(hidden))
        fresh, layers = states[:, G - new :] if new < G else states, (self.to_k, self.to_v)
        total = squares(q, k, v, fresh, layers, evicted, held=G - new, scale=self.scale)
        return {"reconstruction": total * (self.reconstruction / (self.heads * self.head_width * read))}

    def _evicted(self, slots: Slots, columns: int, layout: Layout) -> tuple[tuple[Picked, ...], int]:
        """What leaves memory at the end of a segment in this call, and how many tokens the loss is a mean of."""
        device = layout.valid.device
        if layout.placement is None:
            return picked_of(layout, slots), layout.read
        fetched = columns - layout.valid.shape[1]
        mine = (each.only(each.queries.max(1) >= fetched) for each in slots.evicted)
        found = tuple(Picked.of(each, device) for each in mine if len(each.row))
        return found, layout.placement.whole.read

    @torch.no_grad()
    def _used_most(self, hidden: Float[Tensor, "B N E"], slots: Slots, keys: Layout) -> Int[Tensor, "B new"]:
        """The columns of the states that are kept."""
        q, k = (self._heads(layer(hidden)) for layer in (self.to_q, self.to_k))
        return used_most(q, k, picked_of(keys, slots), slots.new, scale=self.scale)

    # --- scores ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B H L D"],
        v: Float[Tensor, "B H L D"],
        z: Float[Tensor, "B H G D"],
        y: Float[Tensor, "B H G D"],
        r: Float[Tensor, "n H D"],
    ) -> Float[Tensor, "B H L D"]:
        """The mechanism on given queries, keys and values of one document, with the layer's u and v, no projections.

        Whoever projects decides where gradients stop: all of them receive those of all pairs.

        Args:
            z, y: keys and values of the compressed states, as many as a document of this length has.
            r: keys of the distances 0, 1, ...: as many as a query sees, or more.
        """
        refuse_export(self.name)
        (B, H, L, D), G = q.shape, self._compressed(q.shape[2])
        if k.shape != q.shape or v.shape != q.shape or z.shape != (B, H, G, D) or y.shape != z.shape:
            shapes = [tuple(x.shape) for x in (q, k, v, z, y)]
            raise ValueError(f"q, k and v must be alike, and z and y hold {G} compressed states, got {shapes}")
        if not (B and L):
            return zeros_for(q, (q, k, v, z, y, r, self.u, self.v))
        keys = Layout.plain(B, L, q.device)
        slots = slots_of(keys, none(B, q.device).layout, self._sizes, LEARNED.get(self.compression, 1))
        wanted = "auto" if self.kernel == "absorbed" else self.kernel  # there is nothing to absorb
        call = RelativeCall(L, L + G, D, q.device, q.dtype, wanted=wanted)
        plan: Any
        if choose(self.name, SEGMENTS[1:], wanted, call).name == "triton":
            plan = self._lots(keys, slots.layout, L)
        else:
            plan = pieces_of(keys, slots.layout, L, self._sizes, together=triton_reason(q.device) is None)
        if r.shape[1:] != (H, D) or len(r) < plan.distances:
            raise ValueError(f"r must be [at least {plan.distances}, {H}, {D}], got {tuple(r.shape)}")
        q, k, v, z, y = (x.transpose(1, 2) for x in (q, k, v, z, y))
        r = r[: plan.distances]
        if isinstance(plan, LotPlan):
            kv = torch.stack([torch.cat([z, k], 1), torch.cat([y, v], 1)], 2)
            out = gathered_attention(q, kv, kv.detach(), r, self.u, self.v, plan, scale=self.scale)
        else:
            given = RelativeOperands(q, k, v, k.detach(), v.detach(), r, self.u, self.v)
            out = segment_attention(given, plan, scale=self.scale, slots=(z, y))
        return out.transpose(1, 2)

    def _heads(self, x: Tensor) -> Float[Tensor, "... H D"]:
        return x.unflatten(-1, (self.heads, -1))
