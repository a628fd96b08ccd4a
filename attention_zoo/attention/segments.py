"""Layers of `hierarchical`: attention within segments, and among their summaries. Chalkidis et al. 2022, §3.

The columns hold a summary for each segment of `segment_length` tokens: before its tokens where the layer is two-sided,
after them where it is causal, since only then is it known (model/hierarchical.py puts them in). Positions say it all:

    P = segment_length + 1,    the segment of column p is p // P,
    p is a summary  if  p mod P = 0    (two-sided)    or    p mod P = segment_length    (causal)

    S    s_i = softmax_j(scale · q_i·k_j) v_j over the columns j of i's segment;    causal: j up to i alone
    D    s_i + softmax_j(scale · q'_i·k'_j) v'_j over the summaries j of i's document, with projections of their own of
         norm(x + s);    two-sided: i is a summary; causal: i is any column, and j those up to i

O(L · segment_length) for S and O((L / segment_length)²) for D, causal O(L² / segment_length). A companion of
`hierarchical`, whose docstring says what is the paper's and what is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.attention.full import Full
from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.contract import Abilities, Attention, Output, Source, Tokens
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon
from attention_zoo.layout.reach import Blocks
from attention_zoo.ops.pattern.several import Keys, attend_to_several
from attention_zoo.options import SegmentLength


class Remembered(NamedTuple):
    """State of a causal layer with attention among summaries.

    Fields:
        columns: keys and values of the segment that is not complete yet.
        summaries: those of all summaries of the document.
    """

    columns: Columns
    summaries: Columns


class Segments(PatternAttention):
    """Attention within segments, and then, with `document`, among their summaries.

    Args:
        segment_length: tokens of a segment, its summary not counted.
        document: whether attention among the summaries of the document follows.
        kernel: auto | blocks | tiles | dense, of the attention within segments.
        shared: the options of `Attention`.
    """

    name = "hierarchical.segments"
    tiny = {"segment_length": 3}
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

    def __init__(
        self, *, segment_length: SegmentLength = 128, document: bool = True, kernel: str = "auto", **shared: Any
    ):
        super().__init__(kernel=kernel, **shared)
        self.segment_length, self.document = segment_length, document
        self.size = segment_length + 1
        self.reach = Blocks(self.size, self._own, most=1, weights="uniform")
        if document:
            bias: dict[tuple[bool, bool], bool | str] = {(True, False): "into", (False, True): "out"}
            self.norm = nn.LayerNorm(self.dim, elementwise_affine=False)  # a gain is the projections' to learn
            self.among = Full(
                dim=self.dim,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_width=self.head_width,
                bias=bias.get((self.bias_into, self.bias_out), self.bias_into),
                scale=self.scale,
                causal=self.causal,
            )

    def _own(self, row: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """A segment sees itself alone; see `Blocks`."""
        links = row[:, None, :, None].expand(-1, self.heads, -1, -1)
        return links, torch.zeros(links.shape)

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B 1 L S"]:
        rows, columns = (x.position.div(self.size, rounding_mode="floor") for x in (queries, keys))
        return hide((rows[:, :, None] == columns[:, None, :])[:, None])

    def pairs(self, length: int) -> float:
        """See `Attention`; summaries among the `length` columns."""
        size = self.size
        whole, rest = divmod(length, size)
        if not self.causal:
            summaries = whole + (rest > 0)
            return whole * size**2 + rest**2 + (summaries**2 if self.document else 0)
        within = (whole * size * (size + 1) + rest * (rest + 1)) // 2
        # each summary is read by all columns from its own on
        among = whole * (length - self.segment_length) - size * whole * (whole - 1) // 2
        return within + (among if self.document else 0)

    @property
    def _horizon(self) -> Horizon:
        return Horizon(0, segment=self.size, most=self.size)

    @property
    def keeps(self) -> tuple[Any, ...]:
        return (Remembered if self.document else Columns), self.kv_heads, self.head_width

    def initial_state(self, batch_size: int) -> Any:
        """See `Layer`: `Remembered`, or without `document` the columns alone."""
        columns: Any = super().initial_state(batch_size)
        among: Any = self.among.initial_state(batch_size) if self.document else None
        return columns if among is None else Remembered(columns, among)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Any) -> Any:
        """See `Attention`; what summaries are told must be computed."""
        if not self.document:
            return super().remember(x, tokens, state=state)
        return Attention.remember(self, x, tokens, state=state)

    def _attended(self, x: Tensor, layout: Layout, state: Any = None, source: Source | None = None) -> Output:
        if not self.document:
            return super()._attended(x, layout, state, source)
        within = super()._attended(x, layout, None if state is None else state.columns)
        found = layout.plan(("summaries", self.size, self.causal), lambda: self._summaries(layout))
        index = found.columns[..., None].expand(-1, -1, self.dim)
        if self.causal:
            asking = self.norm(x + within.hidden)
            told = asking.gather(1, index)
        else:
            asking = told = self.norm(x.gather(1, index) + within.hidden.gather(1, index))
        k, v = self._heads(self.among.to_k(told)), self._heads(self.among.to_v(told))
        held = Columns.of(found.layout, k, v)
        if state is not None:
            held = state.summaries.append(found.layout, k, v, horizon=Horizon())
        q = self._heads(self.among.to_q(asking))
        out = self._answers(q, layout if self.causal else found.layout, held)
        more = self.among.to_out(rearrange(out, "b h l d -> b l (h d)")).to(within.hidden.dtype)
        if self.causal:
            hidden = within.hidden + more
        else:
            there = found.layout.valid[..., None]  # other rows point at whatever column
            hidden = within.hidden.scatter_add(1, index, more.masked_fill(~there, 0))
        if state is not None:
            state = Remembered(within.state, held.settle(found.layout, horizon=Horizon())[0])
        return Output(hidden, state)

    def _answers(self, q: Float[Tensor, "B H n D"], queries: Layout, held: Columns) -> Float[Tensor, "B H n D"]:
        """What the summaries held say to queries of some columns."""
        k, v = held.held
        if self.causal and q.shape[2] > 1 and self.kernel != "dense":
            # in tiles: fused attention would want a mask of all columns by all summaries
            return attend_to_several(q, queries, [Keys(k, v, held.tokens)], scale=self.scale, causal=True)
        kernel = "dense" if self.kernel == "dense" else "auto"
        return self.among.attend(q, k, v, queries, held.tokens, kernel=kernel)

    def _summaries(self, layout: Layout) -> Summaries:
        host = layout.host
        place = self.segment_length if self.causal else 0
        there = host.valid & (host.position % self.size == place)
        count = int(there.sum(1).max(initial=0))
        # in order, pushed to the left
        columns = np.argsort(~there, axis=1, kind="stable")[:, :count]
        found = host.take(columns).only(np.take_along_axis(there, columns, 1))
        return Summaries(Layout.known(found, layout.valid.device), tensor_of(columns, layout.valid.device))


class Summaries(NamedTuple):
    """Which columns of a call are summaries, n of them; rows with fewer are filled up with padding at the end.

    Fields:
        layout: of the summaries, at the positions where they stand.
        columns: [B, n], where they are.
    """

    layout: Layout
    columns: Int[Tensor, "B n"]
