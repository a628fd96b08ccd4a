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
one key. Not for lengths at which L² / c is too much. `task=flip_flop model=tiny` (one seed, a bit remembered over up to
128 tokens): 78.4 %, where full has 99.1 % and longformer with window=8 66.8 %. `task=mqar steps=300`, recall of pairs:
24.1 %, where full has 99.8 % at that step of 600.

A step of decoding reads the compressed keys where the state holds them, and copies none.

Checked: against memory-compressed-attention 0.0.7 at whole groups, causal and two-sided, in
tests/oracles/memory_compressed.py; its scale is that of the model's width (E^-0.5), and its `input_mask` hides what
should be seen, so that padding is held to loops alone: tests/references/memory_compressed.py. Largest error of outputs
and gradients 9e-7 in float32 and 1e-15 in float64 (tests/oracles/README.md).
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.attention.derived_keys import DOCUMENT, DerivedKeys
from attention_zoo.contract import Abilities, Operands
from attention_zoo.layout.host import Array, Host, on_host, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Ledger, behind, chosen
from attention_zoo.layout.placement import Placement
from attention_zoo.layout.pooled import Pooled, pooled
from attention_zoo.layout.reach import Anywhere
from attention_zoo.layout.visible import visible
from attention_zoo.ops.exchange.groups import Gathered, Parts, gathered, gathering
from attention_zoo.ops.pattern import flex, several_flex
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several
from attention_zoo.ops.pattern.several_flex import Set
from attention_zoo.ops.pattern.strided import convolved, strides_of


class Compressed(NamedTuple):
    """State.

    Fields:
        columns: compressed keys and values, [B, K, G, D]; positions count groups.
        waiting: keys and values of tokens whose group is not complete, [B, K, n, D], n < compression.
    """

    columns: Columns
    waiting: Columns


class MemoryCompressed(DerivedKeys):
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
    travels = "keys of complete groups, 1 / compression of the sequence"
    companions = {"local": "attention_zoo.attention.memory_compressed_local.LocalBlocks"}

    def __init__(self, *, compression: Annotated[int, Field(ge=1, le=1024)] = 3, **shared: Any):
        super().__init__(**shared)
        self.compression, width = compression, self.kv_heads * self.head_width
        self.compress = nn.Conv1d(width, width, compression, stride=compression, groups=self.kv_heads)
        self.null_key, self.null_value = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def pairs(self, length: int) -> float:
        """See `Attention`; the convolution costs as much as D pairs a token and key head."""
        c = self.compression
        groups = sum((i + 1) // c for i in range(length)) if self.causal else length * -(-length // c)
        return float(groups + length + length * self.head_width * self.kv_heads / self.heads)

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: groups, and the null key."""
        c = self.compression
        return [float(((at + 1) // c if self.causal else -(-length // c)) + 1) for at in range(length)]

    def oldest_seen(self, length: int) -> list[int]:
        """See `Attention`: the first group reaches everybody behind it."""
        return [0 if at + 1 >= self.compression or not self.causal else at for at in range(length)]

    def made_of(self, x: Float[Tensor, "1 L E"], tokens: Layout) -> Int[Tensor, "G c"]:
        """See `Attention`: groups."""
        groups = pooled(tokens, self.compression, partial=not self.causal)
        members, missing = groups.members[0], groups.missing
        return members if missing is None else members.masked_fill(missing[0, ..., 0], -1)

    def core(self, batch: int, length: int) -> Operands:
        """See `Attention`: compression is part of the call."""
        keys = batch, self.kv_heads, length, self.head_width
        shapes = ((batch, self.heads, length, self.head_width), keys, keys)
        return Operands(shapes, True, (*self.compress.parameters(), self.null_key, self.null_value))

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Compressed, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Compressed:
        nothing: Columns = super().initial_state(batch_size)
        return Compressed(nothing, nothing)

    def keep(
        self,
        layout: Layout,
        k: Float[Tensor, "B K L D"],
        v: Float[Tensor, "B K L D"],
        state: Compressed | None,
    ) -> tuple[Columns, Compressed | None]:
        """See `DerivedKeys`: all groups that the queries may see, at the numbers of the groups."""
        if state is None:
            return self._compressed(k, v, pooled(layout, self.compression, partial=not self.causal)), None
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
            columns = columns.append(groups.groups, *self._compressed(k, v, groups).buffers, horizon=DOCUMENT)
            settled = columns.settle(groups.groups, horizon=DOCUMENT)[0]
        kept, ledger = tokens.plan(("waiting", self.compression), lambda: _waiting(tokens, groups.waiting))
        index = kept[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return columns, Compressed(settled, Columns.of(ledger, k.gather(2, index), v.gather(2, index)))

    def answer(
        self, q: Float[Tensor, "B H L D"], queries: Layout, held: Columns, scale: float
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: of the null key and the groups."""
        (k, v), shape = held.held, (len(q), self.kv_heads, 1, self.head_width)
        nulls = [x.view(1, *shape[1:]).expand(shape).to(k.dtype) for x in (self.null_key, self.null_value)]
        sets = [Keys(nulls[0], nulls[1], None), Keys(k, v, self._ends(held.tokens))]
        return attend_to_several(q, queries, sets, scale=scale, causal=self.causal)

    def alone(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        keys: Layout,
        scale: float,
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: on CUDA with the null key and the groups in one function."""
        if several_flex.refuse_queries(q):
            return super().alone(q, queries, k, v, keys, scale)
        groups = pooled(keys, self.compression, partial=not self.causal)
        ends = self._ends(groups.groups)
        sizes = 1, ends.valid.shape[1]
        seen = visible(queries, ends, reach=Anywhere(weights="uniform"), causal=self.causal)
        sets = [Set(1, None, None, (None,)), Set(sizes[1], ends, None, seen)]
        strides = strides_of(keys, groups, several_flex.columns_for(sizes), flex.channels_for(self.head_width), k)
        assert self.compress.bias is not None
        nulls = self.null_key, self.null_value
        k, v = convolved(k, v, self.compress.weight, self.compress.bias, nulls, strides)
        return several_flex.run_joined(q, queries, k, v, sets, scale)

    def in_place(
        self,
        q: Float[Tensor, "B H L D"],
        queries: Layout,
        k: Float[Tensor, "B K L D"],
        v: Float[Tensor, "B K L D"],
    ) -> Float[Tensor, "B H L D"]:
        """See `DerivedKeys`: each process convolves what it has of a group, and who sees the group adds that."""
        (B, K, _, D), placement, c = k.shape, queries.placement, self.compression
        mine = pooled(queries, c, partial=True)
        plan = queries.plan(("gathered", c, self.causal), lambda: self._gathering(placement))
        both = self._convolved(torch.cat([k, v], 1), mine, biased=False).permute(1, 3, 0, 2, 4).flatten(2)
        whole = gathered(both, plan, "keys of groups").view(B, -1, 2, K, D).permute(2, 0, 3, 1, 4)
        assert self.compress.bias is not None
        keys, values = whole + self.compress.bias.view(K, 1, D)
        return self.answer(q, queries, Columns.of(plan.groups, keys, values), self.scale)

    def _gathering(self, placement: Placement) -> Gathered:
        c, whole = self.compression, placement.whole
        complete = pooled(whole, c, partial=not self.causal).groups.host
        parts = []
        for columns in placement.columns:
            found = pooled(Placement.chosen(whole, columns), c, partial=True)
            parts.append(
                Parts(found.groups.host.only(_among(found.groups.host, complete)), (found.columns >= 0).sum(2))
            )
        position, length = whole.host.position, whole.host.length
        high = (position + 1) // c if self.causal else -(-length // c)
        return gathering(placement, parts, np.zeros_like(high), high)

    def _compressed(self, k: Tensor, v: Tensor, groups: Pooled) -> Columns:
        """Keys and values of groups, [B, K, G, D]."""
        if on_host(k.device):  # where half as much is held at a time; elsewhere fewer calls count
            return Columns.of(groups.groups, *(self._convolved(x, groups)[0] for x in (k, v)))
        return Columns.of(groups.groups, *self._convolved(torch.cat([k, v], 1), groups))

    def _convolved(
        self, x: Float[Tensor, "B NK L D"], groups: Pooled, *, biased: bool = True
    ) -> Float[Tensor, "N B K G D"]:
        """The strided convolution of keys, of values or of both, as one product a head."""
        K = self.kv_heads
        members = rearrange(groups.take(x.transpose(1, 2)), "b g c (n k) d -> k (n b g) (d c)", k=K)
        weight = rearrange(self.compress.weight, "(k e) d c -> k (d c) e", k=K)
        assert self.compress.bias is not None
        bias = self.compress.bias.view(K, 1, -1)
        found = torch.baddbmm(bias, members, weight) if biased else torch.bmm(members, weight)
        return rearrange(found, "k (n b g) e -> n b k g e", n=x.shape[1] // K, b=len(x))

    def _ends(self, groups: Layout) -> Layout:
        """Groups at the positions of their last tokens."""
        c = self.compression

        def make() -> Layout:
            host = groups.host
            ends = host._replace(position=host.position * c + c - 1, length=host.length * c)
            return Layout.known(ends, groups.valid.device)

        return groups.plan(("ends", c), make)


def _among(groups: Host, whole: Host) -> Array:
    """Which of these groups are among those of the whole sequence."""
    found = np.zeros(groups.valid.shape, bool)
    for row in range(len(found)):
        here, there = groups.valid[row], whole.valid[row]
        known = set(zip(whole.document[row, there].tolist(), whole.position[row, there].tolist(), strict=True))
        pairs = zip(groups.document[row, here].tolist(), groups.position[row, here].tolist(), strict=True)
        found[row, here] = [pair in known for pair in pairs]
    return found


def _waiting(tokens: Layout, mask: Array) -> tuple[Tensor, Ledger]:
    """Which columns wait, [B, n], and what they are."""
    columns, kept = chosen(tokens.host, mask)
    device = tokens.valid.device
    if columns is None:  # all of them
        columns = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    return tensor_of(columns, device), Ledger.of(Layout.known(kept, device))
