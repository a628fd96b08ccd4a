"""Layers of `hierarchical`: attention within segments, and among their summaries. Chalkidis et al. 2022, §3.

The columns hold a summary for each segment of `segment_length` tokens: before its tokens where the layer is two-sided,
after them where it is causal, since only then is it known (model/hierarchical.py puts them in). Positions say it all:

    P = segment_length + 1,    the segment of column p is p // P,
    p is a summary  if  p mod P = 0    (two-sided)    or    p mod P = segment_length    (causal)

    S     s_i = softmax_j(scale · q_i·k_j) v_j over the columns j of i's segment;    causal: j up to i alone
    SD    s + D(norm(x + s)), with D of projections of its own (attention/summaries.py)

O(L · segment_length) for S and O((L / segment_length)²) for D, causal O(L² / segment_length). A companion of
`hierarchical`, whose docstring says what is the paper's and what is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.attention.summaries import Summaries
from attention_zoo.contract import Attention, Output, Source, Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon
from attention_zoo.layout.reach import Blocks
from attention_zoo.layout.visible import Visible, between
from attention_zoo.ops.pattern import several_flex
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several
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
        kernel: auto | flex | blocks | tiles | dense, of the attention within segments.
        shared: the options of `Attention`.
    """

    name = "hierarchical.segments"
    travels = None  # summaries of one process are not those of another
    tiny = {"segment_length": 3}
    declared = Summaries.declared

    def __init__(
        self, *, segment_length: SegmentLength = 128, document: bool = True, kernel: str = "auto", **shared: Any
    ):
        super().__init__(kernel=kernel, **shared)
        self.segment_length, self.document = segment_length, document
        self.size = segment_length + 1
        self.reach = Blocks(self.size, self._own, most=1, weights="uniform")
        if document:
            bias: dict[tuple[bool, bool], bool | str] = {(True, False): "into", (False, True): "out"}
            self.among = Summaries(
                segment_length=segment_length,
                kernel="dense" if kernel == "dense" else "auto",
                dim=self.dim,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_width=self.head_width,
                bias=bias.get((self.bias_into, self.bias_out), self.bias_into),
                scale=self.scale,
                causal=self.causal,
            )
            self.among.norm = nn.LayerNorm(self.dim, elementwise_affine=False)  # a gain is the projections' to learn

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
        # causal, each column sees itself and those before it
        within = sum(n * (n + 1) // 2 if self.causal else n * n for n in [size] * whole + [rest])
        return within + (self.among.pairs(length) if self.document else 0)

    def _run(self, call: PatternCall, kernel: str) -> Float[Tensor, "B H L D"]:
        """On CUDA by FlexAttention, which is launched once whatever the length: see `PatternAttention`."""
        if kernel != "auto" or call.sink is not None or several_flex.refuse_queries(call.q):
            return super()._run(call, kernel)
        queries, keys = call.queries, call.keys

        def find() -> tuple[Visible, Layout]:
            at = queries.host.position
            own = at // self.size * self.size
            return (between(queries, keys, own, at + 1 if self.causal else own + self.size),), keys

        # the plan keeps what the key's id is of
        seen = queries.plan(("own segment", id(keys), self.size, self.causal), find)[0]
        sets = [Keys(call.k, call.v, keys, seen=seen)]
        return attend_to_several(call.q, queries, sets, scale=call.scale, causal=self.causal)

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
        held, summaries = (None, None) if state is None else state
        within = super()._attended(x, layout, held)
        after = self.among._attended(x + within.hidden, layout, summaries)
        hidden = within.hidden + after.hidden.to(within.hidden.dtype)
        return Output(hidden, None if state is None else Remembered(within.state, after.state))

    def _of_padding(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, " E"]:
        within = super()._of_padding(x)
        return within + self.among._of_padding(x) if self.document else within
