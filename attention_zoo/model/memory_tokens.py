"""Memory tokens: segments linked by vectors that the stack itself reads and writes. A wrapper.

Bulatov et al. 2022, "Recurrent Memory Transformer", §3. A document is cut into segments of S tokens, counted from its
beginning. Segment t goes through whatever stands inside, a document of its own, with m memory vectors around it:

    causal      [.., .., M'] = inner([M; x_t; M])        M, in front, is read by all; M behind has seen all
    two-sided   [M', ..]     = inner([M; x_t])           both in one
    M <- norm(M');  before the first segment M is learned

O(L·(S + 2m)) time and O(L) memory around `full`, less around what is linear itself; a state of m vectors and what the
inner mechanism keeps of one segment. Segments follow each other: the host loops over them, and each takes the stack's
operators once more and up to 30 of its own, forward and backward (tests/test_launches.py); so do documents of a row.

Paper: as above.

Released code: two. Around Transformer-XL (LM-RMT) and around models of Hugging Face; the outputs that become memory are
behind the model's last norm in both (norms follow additions, or are the model's own). Its option k2, through how many
segments gradients go, changes nothing: a local name is bound anew. With memory in front only (`write="front"`), a
causal model writes before it has read: the published runs of that kind stay at chance.

Here: the stack's last norm is outside of wrappers, so memory has one of its own, without parameters. Embedding-level
positions are those of the document, attention-level ones those of the segment with its memory. Segments are counted
over the valid tokens of each document, whatever the calls, so that padding, packing and cuts change nothing: a state
carries memory, the open segment, and gradients. Only a complete segment writes, when something follows it.
`truncate=k` counts from the end of what the call has of a document: memory is cut off before every (k+1)-th segment,
hence gradients of the last one reach k segments back and no other's reach further; and they never leave the call then.
Processes that share a row hand memory and the open segment on, rows in lots (model/placed.py), without `truncate`.
Losses of what is inside count for a token of the text what they sum up to, those of its parameters alone are a mean
over segments. What keeps no state itself has none in segments either. With
`write="front"` a causal memory is the same layer applied to itself, once a segment, so that roundings add up: the error
of bfloat16 rises from .4 % in the first segment to 2 % in the twelfth, in the definition's loop as here.

When: the text is far longer than what attention can afford, what has to be remembered fits in a few vectors, and the
order of training allows for a loop. Not for exact recall of many things: everything goes through m vectors. Six symbols
in segments of six, m = 6, model=tiny, optimizer.lr=1e-3, one seed (preset=memory): reversed over two segments
(task=rmt_reverse task.tokens=6 seq_len=12, 2,000 steps) and copied over three (task=rmt_copy task.tokens=6 seq_len=18,
3,000 steps) 1.00. With `write="front"` .10, which is chance, and .18, which is the most it can have, as one answer of
twelve stands in its segment. On recall of four pairs (task=mqar attention.count=4 attention.segment_length=16, 600
steps) .49, in front .32, where full has 1.00.

Checked: against a loop over documents and segments (tests/references/memory_tokens.py), outputs and gradients, 1e-12 in
float64; one segment against the mechanism inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.contract import Abilities, Output, Source, Tokens, Unsupported, able, add_losses, weighed
from attention_zoo.layout.host import Array, Host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.segments import Pieces, pieces
from attention_zoo.model.state import detach, reserve
from attention_zoo.model.wrapper import Nested, Wrapper
from attention_zoo.options import Natural, Positive
from attention_zoo.place import place_of
from attention_zoo.rules import OneOf


class Memory(NamedTuple):
    """What memory tokens keep from call to call.

    Fields:
        vectors: [B, m, E], what the next segment reads, or the open one has read; with memory in front alone what the
            open one has written.
        last: [B, 1], the last column that the layer inside got with its state: segments are its documents.
    """

    vectors: Float[Tensor, "B m E"]
    last: Layout


class MemoryTokens(Wrapper):
    """Segments with memory around a layer or a stack.

    Args:
        inner: what reads the segments: any mechanism, or a list of such for a stack.
        count: m, memory vectors.
        segment_length: S, tokens of a segment.
        truncate: through how many segments gradients go back, 0 for none; None: all, from call to call too.
        write: where the vectors stand that become the next memory. "end": behind the segment, besides those in front.
            "front": those in front are both, as in an encoder; a causal one writes before it has read. "auto": "end"
            if causal, else "front", the paper's forms.
        shared: the options of `Attention`, for the mechanism inside.
    """

    name = "memory_tokens"
    tiny = {"count": 4, "segment_length": 8}

    def __init__(
        self,
        *,
        inner: Any = "full",
        count: Positive = 16,
        segment_length: Positive = 512,
        truncate: Natural | None = None,
        write: Annotated[str, OneOf("auto", "end", "front")] = "auto",
        **shared: Any,
    ):
        super().__init__(inner=inner, **shared)
        self._check_inner()
        self.count, self.segment_length, self.truncate = count, segment_length, truncate
        self.at_end = self.causal and write != "front"
        if write == "end" and not self.causal:
            raise Unsupported(
                self.name, "write=end with causal=False", "memory in front sees all of its segment", "write=auto"
            )
        self.memory = nn.Parameter(torch.randn(count, self.dim))

    def _check_inner(self) -> None:
        inside = list(self.inner.modules())
        if any(getattr(each, "cross", False) for each in inside):
            raise Unsupported(
                self.name, "cross-attention inside", "its segments are documents of their own, a source's are not",
                "memory_tokens around the encoder",
            )  # fmt: skip
        if any(getattr(each, "end", None) == "both" for each in inside):
            raise Unsupported(
                self.name, "reversible=both", "memory must be as wide as what it is read with", "reversible=true"
            )

    @staticmethod
    def abilities_around(inner: Abilities) -> Abilities:
        """Segments are bounded, so what is inside may cost what it wants."""
        return replace(
            Wrapper.abilities_around(inner), carry="prefix" if inner.carry == "prefix" else "none",
            global_tokens="none", compute="linear", activations="linear", state="constant",
        )  # fmt: skip

    @property
    def cuts_gradients(self) -> bool:
        """See `Attention`: where `truncate` counts from the end of a call."""
        return self.truncate is not None or super().cuts_gradients

    def calls(self, length: int) -> tuple[tuple[int, int], ...]:
        """See `Wrapper`: segments that another follows, with the memory that they read and write, and the last."""
        m, whole = self.count, (length - 1) // self.segment_length
        last = m + length - whole * self.segment_length
        return ((m + self.segment_length + m * self.at_end, whole), (last, 1)) if whole else ((last, 1),)

    def own_state(self, batch_size: int) -> Memory:
        device, _ = place_of(self)
        vectors = self.memory.detach().repeat(batch_size, 1, 1)
        return Memory(vectors, Layout.plain(batch_size, 1, device))

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Nested | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        if source is not None:
            raise Unsupported(self.name, "source", "it was built without cross-attention", "source=None")
        x, layout = self.enter(x, tokens, state, source)
        return self._in_rounds(x, layout, state, choices)

    # which rows read and write is the host's to say; as torch.compiler.disable, without loading the compiler
    @torch._disable_dynamo
    def _in_rounds(self, x: Tensor, layout: Layout, state: Nested | None, choices: Any) -> Output:
        self._check(layout, state, len(x))
        if state is not None and self.truncate is not None:
            state = detach(state)
        # what is inside keeps one segment, whatever room was asked for a whole context
        memory, inner = (None, None) if state is None else (state.own, reserve(state.inner, 0))
        vectors = self.memory.expand(len(x), -1, -1) if memory is None else memory.vectors
        last = None if memory is None else memory.last
        found = pieces(layout.host, self.segment_length)
        known: dict[int, Layout] = {}
        losses: dict[str, Tensor] = {}
        hidden, made = [], []
        for number, text in enumerate(found.split(x)):
            one = self._round(found, number, last, x.device, known)
            read = self._read(vectors, found, number).to(x.dtype)
            columns = torch.cat([read] * one.reads + [text] + [read] * one.writes, 1)
            out = self.inside(
                columns, one.layout, state=None if one.last is None else inner,
                choices=choices[number] if isinstance(choices, tuple) else choices,
            )  # fmt: skip
            sizes = [self.count] * one.reads + [text.shape[1]] + [self.count] * one.writes
            parts = out.hidden.split(sizes, 1)
            hidden.append(parts[int(one.reads)])
            if one.updates.any():
                new = nn.functional.layer_norm(parts[-1 if self.at_end else 0], (self.dim,))
                vectors = chosen(one.updates, new, vectors)
            if one.last is not None:
                last, inner = one.last, out.state
            share = one.layout.read / max(1, layout.read)
            losses = add_losses(losses, weighed(out.losses, self.inner, share, 1 / len(found.width)))
            made.append(out.choices)
        new_state = None if last is None else Nested(Memory(vectors, last), inner)
        return Output(found.joined(hidden), new_state, losses, tuple(made))

    def _check(self, layout: Layout, state: Nested | None, rows: int) -> None:
        """What a stack's own checks do not know."""
        if layout.any_global:
            raise Unsupported(
                self.name, "global tokens", "no token sees beyond its segment",
                able(global_tokens=("any", "first_call")),
            )  # fmt: skip
        if state is not None:
            own = state.own
            shape = rows, self.count, self.dim
            if not isinstance(own, Memory) or own.vectors.shape != shape:
                given = tuple(own.vectors.shape) if isinstance(own, Memory) else type(own).__name__
                raise ValueError(f"state must hold memory of shape {shape} like this layer and this call, got {given}")

    def _read(self, vectors: Tensor, found: Pieces, number: int) -> Float[Tensor, "B m E"]:
        """What the rows of a round read: at the beginning of a document what is learned."""
        anew = found.exists[:, number] & (found.segment[:, number] == 0)
        if self.truncate is not None:
            cut = found.left[:, number] % (self.truncate + 1) == self.truncate
            vectors = chosen(cut, vectors.detach(), vectors)
        return chosen(anew, self.memory.expand_as(vectors), vectors)

    def _round(
        self, found: Pieces, number: int, last: Layout | None, device: torch.device, known: dict[int, Layout]
    ) -> Round:
        """How a round goes through what is inside.

        Args:
            last: of the state; None: there is none.
            known: layouts without padding, by width: what is inside plans for each once.
        """
        exists, completes = found.exists[:, number], found.completes[:, number]
        wanted = found.left[:, number] > 0 if last is None else np.ones_like(exists)
        opens = exists if last is None or number else exists & found.starts[:, number]
        closes = completes & wanted
        # a segment that begins and ends here leaves the state of what is inside alone
        stateful = last is not None and bool((exists & ~(opens & completes)).any())
        reads, writes = bool(opens.any()), self.at_end and bool(closes.any())
        start = int(found.width[:number].sum())
        text = slice(start, start + int(found.width[number]))
        m, S, here = self.count, self.segment_length, found.here[:, text]
        updates = closes if self.at_end else opens & wanted
        width = here.shape[1] + m * (reads + writes)
        whole = opens & found.starts[:, number] & here.all(1) & (closes | (not writes))
        if not stateful and bool(whole.all()):
            if width not in known:
                known[width] = Layout.plain(len(here), width, device)
            return Round(known[width], reads, writes, updates)
        place = np.take_along_axis(found.host.position, found.column[:, text], 1) % S + m
        memory = np.broadcast_to(np.arange(m), (len(here), m))
        front, back = slice(0, m * reads), slice(0, m * writes)
        position = np.concatenate([memory[:, front], place, memory[:, back] + m + S], 1)
        valid = np.repeat(np.stack([opens, closes], 1), m, 1)
        valid = np.concatenate([valid[:, front], here, valid[:, m:][:, back]], 1)
        document = np.zeros_like(position)
        if stateful:
            assert last is not None
            document += last.host.document + opens[:, None]
        length = np.where(valid, position + 1, 0).max(1, keepdims=True, initial=0)
        host = Host(position, valid, np.zeros_like(valid), document, np.broadcast_to(length, position.shape))
        here_last = Layout.known(host.cut(slice(-1, None)), device) if stateful else None
        return Round(Layout.known(host, device), reads, writes, updates, here_last)


class Round(NamedTuple):
    """How the pieces of a round go through what is inside.

    Fields:
        layout: of memory, text and memory.
        reads, writes: whether memory stands in front and behind.
        updates: [B], whose memory the outputs become.
        last: the last column of each row, where what is inside goes on with its state; else None.
    """

    layout: Layout
    reads: bool
    writes: bool
    updates: Array
    last: Layout | None = None


def chosen(rows: Array, those: Tensor, others: Tensor) -> Float[Tensor, "B m E"]:
    """Those in the rows that are marked [B], else the others."""
    if bool(rows.all()) or not bool(rows.any()):
        return those if bool(rows.all()) else others
    return torch.where(tensor_of(rows, those.device)[:, None, None], those, others)
