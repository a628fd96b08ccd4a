"""H-Transformer-1D: near keys exactly, farther ones in ever larger groups. Zhu & Soricut 2021, "H-Transformer-1D".

Tokens stand in blocks of `block`. A query sees its own block and the two beside it key by key. Everything else it sees
in groups of 2, 4, 8, ... tokens, by their mean key and mean value, a group of n counting n times: the farther, the
larger. O(L · log L) time, O(L) memory.

    level of the pair (i, j):  the smallest l with |i // (block · 2^l) - j // (block · 2^l)| <= 1
    j is seen by i as          itself (level 0), or as one of the group of j // 2^l of that level
    out_i = Σ_groups n · exp(q_i · mean k) · mean v  /  Σ_groups n · exp(q_i · mean k),    causal: j <= i alone

So every pair is covered exactly once, and one softmax holds all levels.

Paper: keys are means and values sums; queries are coarsened, too, and a level's output is handed to all tokens of a
group: O(L) time. Blocks of a level that the finer one covers already are masked. Relative positions of each level.

Released code (flaxformer's h_transformer): the same, with one largest score for all levels of a head. In a causal model
a coarsened query holds later tokens than the first of its group. Its blocks of queries are never coarsened further than
the row is long, which must be a power of two of blocks.

Here: keys and values alone are coarsened, never queries, so that a causal token is blind to the future to the last bit;
it costs the logarithm. Any length: the last group of a document may be smaller, and counts for what it holds. Groups
count the valid tokens of a document. The softmax is one over all levels, by log-sum-exp. No relative positions.

A state keeps the keys and values of the document, O(L); a step forms its groups anew.

When: a long context of which the near part matters word by word and the far part by its gist. Not where single far
tokens must be found again: a mean over many keys does not point to one of them.

Checked: against a loop over pairs in tests/references/h_transformer_1d.py, outputs and gradients, 1e-12 in float64. The
package h-transformer-1d is no oracle: it stops a level early, and takes another maximum for each level.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.attention.operator import one_operator, refuse_export
from attention_zoo.contract import Abilities, Attention, Output, Source, Tokens, at_least
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, none
from attention_zoo.layout.levels import levels
from attention_zoo.layout.visible import Visible, between
from attention_zoo.ops.pattern.several import Keys, attend_to_several
from attention_zoo.ops.softmax.function import watch, zeros_for
from attention_zoo.options import LARGEST
from attention_zoo.place import place_of

DOCUMENT = Horizon()
"""What a later token may see: all of its document."""


class HTransformer1D(Attention):
    """Attention over a hierarchy of means.

    Args:
        block: tokens of a block at level 0 (the paper's numerical rank), an even number.
        shared: the options of `Attention`.
    """

    name = "h_transformer_1d"
    tiny = {"block": 2}
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="none",
        cross=False,
        compute="loglinear",
        activations="linear",
        state="linear",
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        block: Annotated[int, Field(ge=2, le=LARGEST, multiple_of=2, description="an even number of at least 2")] = 16,
        **shared: Any,
    ):
        super().__init__(**shared)
        self.block = block
        width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, kv_width, bias=self.bias_into)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return Columns, self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Columns:
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
        state: Columns | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`."""
        x, layout = self.enter(x, tokens, state, source, choices)
        q, k, v = (self._heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        held = Columns.of(layout, k, v) if state is None else state.append(layout, k, v, horizon=DOCUMENT)
        k, v = held.held
        out = self._attend(q, k, v, layout, held.tokens, self.scale)
        new = None
        if state is not None:
            out, new = watch(out, held.tokens), held.settle(layout, horizon=DOCUMENT)[0]
        return Output(self.to_out(rearrange(out, "b h l d -> b l (h d)")), new)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Columns) -> Columns:
        """See `Attention`: keys and values alone."""
        x, layout = self.enter(x, tokens, state, None)
        k, v = (self._heads(project(x)) for project in (self.to_k, self.to_v))
        return state.append(layout, k, v, horizon=DOCUMENT).settle(layout, horizon=DOCUMENT)[0]

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        keys: Tokens | None = None,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """On given queries, keys and values: for use in models of one's own.

        Args:
            keys: tokens of the S columns, of which the last L are the queries'; default all valid from position 0.
            scale: factor on q·k; default the layer's.
        """
        refuse_export(self.name)
        (B, H, L, D), S = q.shape, k.shape[2]
        if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, D) or H % k.shape[1] or S < L:
            raise ValueError(
                "q must be [B, H, L, D] and k, v [B, K, S, D] with K dividing H and S at least L, "
                f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        layout = Layout.plain(B, S, q.device) if keys is None else Layout.of(keys)
        if layout.valid.shape != (B, S):
            raise ValueError(f"keys must have shape {(B, S)}, got {tuple(layout.valid.shape)}")
        queries = layout.columns(slice(S - L, S))
        return self._attend(q, k, v, queries, layout, self.scale if scale is None else scale)

    def pairs(self, length: int) -> float:
        """See `Attention`: a group is one pair."""
        layout = Layout.plain(1, length)
        parts = [self._near(layout, layout), *(self._far(layout, level.groups, n + 1) for n, level in self._up(layout))]
        return float(sum((seen.stop - seen.first).sum() for part in parts for seen in part))

    # --- the levels --------------------------------------------------------------------------------------------------

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float) -> Tensor:
        if not (q.numel() and k.numel()):
            return zeros_for(q, (q, k, v))
        sets = [Keys(k, v, keys, seen=self._near(queries, keys))]
        for number, level in self._up(keys):
            k, v = level.mean(k), level.mean(v)
            sets.append(
                Keys(k, v, level.groups, weight=level.log_count, seen=self._far(queries, level.groups, number + 1))
            )
        return attend_to_several(q, queries, sets, scale=scale, causal=self.causal)

    def _up(self, keys: Layout) -> Any:
        """(0, level 1), (1, level 2), ...: as many as there are pairs for."""
        host = keys.host
        last = int(np.where(host.valid, host.position, 0).max(initial=0)) // self.block
        return enumerate(levels(keys, max(0, last.bit_length() - 1)))

    def _near(self, queries: Layout, keys: Layout) -> Visible:
        """What is seen key by key."""

        def find() -> tuple[Visible, Layout]:
            at = queries.host.position
            own = at // self.block * self.block
            high = at + 1 if self.causal else own + 2 * self.block
            return (between(queries, keys, own - self.block, high),), keys

        # the plan keeps what the key's id is of
        return queries.plan(("near", id(keys), self.block, self.causal), find)[0]

    def _far(self, queries: Layout, groups: Layout, level: int) -> Visible:
        """What is seen in groups of this level: in the blocks beside the own one, but for what the finer level has."""

        def find() -> tuple[Visible, Layout]:
            half = self.block // 2
            fine = queries.host.position // (half << level)  # which block of the level below
            own = fine // 2
            found = [between(queries, groups, (own - 1) * self.block, (fine - 1) * half)]
            if not self.causal:
                found.append(between(queries, groups, (fine + 2) * half, (own + 2) * self.block))
            return tuple(found), groups

        return queries.plan(("far", id(groups), level, self.block, self.causal), find)[0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
