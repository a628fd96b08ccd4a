"""Attention among the summaries of segments: a layer of `hierarchical`, and a part of one. Chalkidis et al. 2022, §3.

    D    o_i = softmax_j(scale · q_i·k_j) v_j over the summaries j of i's document;
         two-sided: i is a summary, other columns get zeros;    causal: i is any column, and j those up to i

O((L / segment_length)²), causal O(L² / segment_length). A companion of `hierarchical`; where summaries stand among the
columns is said in attention/segments.py, beside which it also works inside of a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.attention.full import Full
from attention_zoo.attention.pattern import hide
from attention_zoo.contract import Abilities, Attention, Output, Source, Tokens
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several
from attention_zoo.options import SegmentLength


class Summaries(Full):
    """Attention among the summaries of the document.

    Args:
        segment_length: tokens of a segment, its summary not counted.
        kernel: auto | dense.
        shared: the options of `Attention`.
    """

    name = "hierarchical.summaries"
    travels = None  # summaries of one process are not those of another
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

    def __init__(self, *, segment_length: SegmentLength = 128, kernel: str = "auto", **shared: Any):
        super().__init__(kernel=kernel, **shared)
        self.segment_length, self.size = segment_length, segment_length + 1
        self.norm: nn.Module = nn.Identity()  # a block has its own; inside of a layer there must be one

    def _is_summary(self, position: Any) -> Any:
        return position % self.size == (self.segment_length if self.causal else 0)

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B 1 L S"]:
        seen: Bool[Tensor, "B 1 S"] = self._is_summary(keys.position)[:, None]
        if not self.causal:
            seen = seen & self._is_summary(queries.position)[..., None]
        return hide(seen.expand(-1, queries.position.shape[1], -1)[:, None])

    def pairs(self, length: int) -> float:
        """See `Attention`; summaries among the `length` columns."""
        whole, rest = divmod(length, self.size)
        if not self.causal:
            return float((whole + (rest > 0)) ** 2)
        # each summary is read by all columns from its own on
        return float(whole * (length - self.segment_length) - self.size * whole * (whole - 1) // 2)

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Any) -> Any:
        """See `Attention`."""
        return Attention.remember(self, x, tokens, state=state)

    def _attended(self, x: Tensor, layout: Layout, state: Any = None, source: Source | None = None) -> Output:
        found = layout.plan(("summaries", self.size, self.causal), lambda: self._found(layout))
        index = found.columns[..., None].expand(-1, -1, self.dim)
        asking = self.norm(x if self.causal else x.gather(1, index))
        told = asking.gather(1, index) if self.causal else asking
        k, v = self._heads(self.to_k(told)), self._heads(self.to_v(told))
        held = Columns.of(found.layout, k, v)
        if state is not None:
            held = state.append(found.layout, k, v, horizon=Horizon())
        q = self._heads(self.to_q(asking))
        out = self._answers(q, layout if self.causal else found.layout, held)
        hidden = self.to_out(rearrange(out, "b h l d -> b l (h d)"))
        if not self.causal:
            there = found.layout.valid[..., None]  # other rows point at whatever column
            hidden = hidden.new_zeros(x.shape).scatter_add(1, index, hidden.masked_fill(~there, 0))
        return Output(hidden, None if state is None else held.settle(found.layout, horizon=Horizon())[0])

    def _answers(self, q: Float[Tensor, "B H n D"], queries: Layout, held: Columns) -> Float[Tensor, "B H n D"]:
        """What the summaries held say to queries of some columns."""
        k, v = held.held
        if self.causal and q.shape[2] > 1 and self.kernel != "dense":
            # in tiles: fused attention would want a mask of all columns by all summaries
            return attend_to_several(q, queries, [Keys(k, v, held.tokens)], scale=self.scale, causal=True)
        return self.attend(q, k, v, queries, held.tokens)

    def _found(self, layout: Layout) -> Found:
        host = layout.host
        there = host.valid & self._is_summary(host.position)
        count = int(there.sum(1).max(initial=0))
        # in order, pushed to the left
        columns = np.argsort(~there, axis=1, kind="stable")[:, :count]
        found = host.take(columns).only(np.take_along_axis(there, columns, 1))
        return Found(Layout.known(found, layout.valid.device), tensor_of(columns, layout.valid.device))


class Found(NamedTuple):
    """Which columns of a call are summaries, n of them; rows with fewer are filled up with padding at the end.

    Fields:
        layout: of the summaries, at the positions where they stand.
        columns: [B, n], where they are.
    """

    layout: Layout
    columns: Int[Tensor, "B n"]
