"""Memory-compressed attention: all queries, a third of the keys. Liu et al. 2018, "Generating Wikipedia", §4.2.4.

A strided convolution makes one key and one value of every c = `compression` tokens, after the projections:

    k'_g = b + sum_t W_t k_(g·c + t),   v'_g likewise by the same W and b,   t = 0 ... c - 1,  W_t [D, D] of each head
    i sees a null key, and every g with  g·c + c - 1 <= p_i  (causal), or all of its document (two-sided)

O(L² / c) time, O(L·D) memory; the cache holds L / c keys. Quadratic, by a factor that is c times smaller.

Paper: c = 3, kernel as wide as the stride. Such layers (M) exchange information over the whole sequence and alternate
with local ones (L) that attend within blocks of 256 tokens, L M L M L in a decoder. What a first token sees, before a
group is complete, is not said.

Released code (tensor2tensor): convolves hidden states, before keys and values are projected, over all channels; the
first hidden state itself stands in front, for everyone to see. A group is seen only by tokens after it: its last token
does not see it. The last group is left out where it is not complete, in encoders, too.

Here: keys and values are convolved as the paper says, head by head and both by one convolution, as the package
memory-compressed-attention does. In front stand a null key and a null value, learned, zeros at first. A group is seen
from its last token on. Two-sided, a last group that is not complete is filled up with zeros (the package fills up the
first); causal, it is seen by nobody, and waits in the state. Groups are counted over the valid tokens of each document,
so that padding, packing and cuts change nothing. `memory_compressed.local` is the paper's local layer:
`hybrid=[memory_compressed.local,memory_compressed] model.depth=5` is its stack, L M L M L.

When: where text is long but a quadratic cost is still affordable, between local layers, which know the last c - 1
tokens that a causal layer of this kind alone does not see. Not where single tokens must be found again: c of them share
one key. Not for lengths at which L² / c is too much.

Checked: against memory-compressed-attention 0.0.7 at whole groups, causal and two-sided, in
tests/oracles/memory_compressed.py; its scale is that of the model's width (E^-0.5), and its `input_mask` hides what
should be seen, so that padding is held to loops alone: tests/references/memory_compressed.py.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.attention.operator import one_operator, refuse_export
from attention_zoo.contract import Abilities, Attention, Operands, Output, Source, at_least
from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, Ledger, behind, chosen, none
from attention_zoo.layout.pooled import Pooled, pooled
from attention_zoo.ops.pattern.several import Keys, attend_to_several
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.place import place_of
from attention_zoo.tokens import Tokens


class Compressed(NamedTuple):
    """State.

    Fields:
        columns: compressed keys and values, [B, K, G, D]; positions count groups.
        waiting: keys and values of tokens whose group is not complete, [B, K, n, D], n < compression.
    """

    columns: Columns
    waiting: Columns


class MemoryCompressed(Attention):
    """Attention of every token to groups of tokens, each of which is one key.

    Args:
        compression: tokens of a group: width and stride of the convolution.
        shared: the options of `Attention`.
    """

    name = "memory_compressed"
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="none",
        cross=False,
        compute="quadratic",
        activations="linear",
        state="linear",
        grouped_heads=True,
    )
    tiny = {"compression": 3}
    companions = {"local": "attention_zoo.attention.memory_compressed_local.LocalBlocks"}

    def __init__(self, *, compression: Annotated[int, Field(ge=1, le=1024)] = 3, **shared: Any):
        super().__init__(**shared)
        self.compression, (K, D) = compression, (self.kv_heads, self.head_width)
        self.to_q = nn.Linear(self.dim, self.heads * D, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, K * D, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, K * D, bias=self.bias_into)
        self.compress = nn.Conv1d(K * D, K * D, compression, stride=compression, groups=K)
        self.null_key, self.null_value = (nn.Parameter(torch.zeros(K * D)) for _ in range(2))
        self.to_out = nn.Linear(self.heads * D, self.dim, bias=self.bias_out)

    def pairs(self, length: int) -> float:
        """See `Attention`; the convolution costs as much as D pairs a token and key head."""
        c = self.compression
        groups = sum((i + 1) // c for i in range(length)) if self.causal else length * -(-length // c)
        return float(groups + length + length * self.head_width * self.kv_heads / self.heads)

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: compression is part of the call."""
        keys = batch, self.kv_heads, length, self.head_width
        shapes = ((batch, self.heads, length, self.head_width), keys, keys)
        return Operands(shapes, True, (*self.compress.parameters(), self.null_key, self.null_value))

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Compressed, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Compressed:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        empty = torch.zeros(batch_size, self.kv_heads, 0, self.head_width, device=device, dtype=dtype)
        return Compressed(*(Columns.of(none(batch_size, device), empty, empty) for _ in range(2)))

    @one_operator
    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Compressed | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`. With a state, every call's output equals the last rows of the whole prefix."""
        x, layout = self.enter(x, tokens, state, source, choices)
        q, k, v = (self._heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        if state is None:
            return Output(self._leave(self._attend(q, *self._compressed(k, v, self._groups(layout)), layout)))
        held, state = self._grown(state, layout, k, v)
        k, v = held.held
        out = self._attend(q, k, v, self._ends(held.tokens), layout)
        return Output(self._leave(watch(out, held.tokens)), state)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Compressed) -> Compressed:
        """See `Attention`: keys and values alone."""
        x, layout = self.enter(x, tokens, state, None)
        return self._grown(state, layout, self._heads(self.to_k(x)), self._heads(self.to_v(x)))[1]

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B K L D"],
        v: Float[Tensor, "B K L D"],
        tokens: Tokens | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """The mechanism on given queries, keys and values of the same tokens, with the layer's convolution and nulls.

        Args:
            tokens: default all valid from position 0. At padding the output is zero.
        """
        refuse_export(self.name)
        (B, _, L, _), keys = q.shape, (len(q), self.kv_heads, q.shape[2], self.head_width)
        if q.shape != (B, self.heads, L, self.head_width) or k.shape != keys or v.shape != keys:
            raise ValueError(
                f"q must be [batch, {self.heads}, length, {self.head_width}] and k, v [batch, {self.kv_heads}, length, "
                f"{self.head_width}], got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        layout = Layout.plain(B, L, q.device) if tokens is None else Layout.of(tokens)
        if layout.valid.shape != (B, L):
            raise ValueError(f"tokens must have shape {(B, L)}, got {tuple(layout.valid.shape)}")
        if not (B and L):
            return zeros_for(q, (q, k, v, *self.parameters()))
        return self._attend(q, *self._compressed(k, v, self._groups(layout)), layout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _leave(self, out: Float[Tensor, "B H L D"]) -> Float[Tensor, "B L E"]:
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))

    # --- compression -------------------------------------------------------------------------------------------------

    def _groups(self, layout: Layout) -> Pooled:
        return pooled(layout, self.compression, partial=not self.causal)

    def _compressed(self, k: Tensor, v: Tensor, groups: Pooled) -> tuple[Tensor, Tensor, Layout]:
        """Keys and values of the groups, [B, K, G, D], and where these stand."""
        return self._convolved(k, groups), self._convolved(v, groups), groups.ends

    def _convolved(self, x: Float[Tensor, "B K L D"], groups: Pooled) -> Float[Tensor, "B K G D"]:
        """The strided convolution as one product a head."""
        members = rearrange(groups.take(x.transpose(1, 2)), "b g c k d -> k (b g) (d c)")
        weight = rearrange(self.compress.weight, "(k e) d c -> k (d c) e", k=self.kv_heads)
        assert self.compress.bias is not None
        found = members @ weight + self.compress.bias.view(self.kv_heads, 1, -1)
        return rearrange(found, "k (b g) e -> b k g e", b=len(x))

    def _attend(
        self, q: Tensor, k: Float[Tensor, "B K G D"], v: Float[Tensor, "B K G D"], ends: Layout, layout: Layout
    ) -> Float[Tensor, "B H L D"]:
        shape = (len(q), self.kv_heads, 1, self.head_width)
        null_key, null_value = (
            x.view(1, *shape[1:]).expand(shape).to(k.dtype) for x in (self.null_key, self.null_value)
        )
        sets = [Keys(null_key, null_value, None), Keys(k, v, ends)]
        return attend_to_several(q, layout, sets, scale=self.scale, causal=self.causal)

    # --- state -------------------------------------------------------------------------------------------------------

    def _grown(self, state: Compressed, layout: Layout, k: Tensor, v: Tensor) -> tuple[Columns, Compressed]:
        """All groups that a call's queries may see, and the state behind the call."""
        columns, waiting = state
        if waiting.filled:
            key = ("behind", id(waiting.ledger.fields), waiting.filled)
            # the key's id stays its own: the plan keeps the ledger
            tokens = layout.plan(key, lambda: (behind(waiting.tokens, layout), waiting.ledger))[0]
            k, v = (torch.cat(pair, 2) for pair in zip(waiting.held, (k, v)))
        else:
            tokens = layout
        groups, settled = pooled(tokens, self.compression), columns
        if groups.members.shape[1]:
            k_new, v_new, _ = self._compressed(k, v, groups)
            columns = columns.append(groups.groups, k_new, v_new, horizon=CURRENT)
            settled = columns.settle(groups.groups, horizon=CURRENT)[0]
        kept, ledger = tokens.plan(("waiting", self.compression), lambda: _waiting(tokens, groups.waiting))
        index = kept[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        waits = Columns.of(ledger, k.gather(2, index), v.gather(2, index))
        return columns, Compressed(settled, waits)

    def _ends(self, groups: Layout) -> Layout:
        """Groups at the positions of their last tokens."""
        c = self.compression

        def make() -> Layout:
            host = groups.host
            return Layout.known(host._replace(position=host.position * c + c - 1, length=host.length * c), self._device)

        return groups.plan(("ends", c), make)

    @property
    def _device(self) -> torch.device:
        return self.null_key.device


CURRENT = Horizon()
"""Groups of finished documents are never asked for again."""


def _waiting(tokens: Layout, mask: Array) -> tuple[Tensor, Ledger]:
    """Which columns wait, [B, n], and what they are."""
    columns, kept = chosen(tokens.host, mask)
    device = tokens.valid.device
    if columns is None:  # all of them
        columns = torch.arange(mask.shape[1]).expand(mask.shape).numpy()
    return tensor_of(columns, device), Ledger.of(Layout.known(kept, device))
