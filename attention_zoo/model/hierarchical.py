"""Hierarchical attention: segments with a summary each, and attention among summaries. Chalkidis et al. 2022, "HAT".

A learned vector, with a sinusoidal code of the segment's number, stands for every `segment_length` tokens of a
document. It is put in before the first block and taken out after the last: a wrapper. Layers are of two kinds:

    S     each segment attends to itself, its summary among it                 (attention/segments.py has the rule)
    D     the summaries of the document attend to each other                   (attention/summaries.py)
    SD    S, and then D

    layout: "S SD"    is tiled over depth, as any list of mechanisms: interleaved "SD" or "S SD", early "SD SD S S",
                      late "S S SD SD", with D by itself "S SD D"

Two-sided a summary stands before the tokens of its segment, which read from the next layer on what it was told of other
segments; what it says after the last layer is added to its tokens. Causal it is written at its segment's end, since
only what is complete can be summed up, and in an SD layer every token, too, reads the summaries of complete segments
before it, besides its own segment's past. O(L · segment_length), and for an SD layer (L / segment_length)² pairs more,
causal L² / (2 · segment_length).

Paper: encoders alone. S and D are whole Transformer layers, each with a feed-forward part. Every segment begins with a
CLS token, the heads read these, and the best layouts interleave; 128 tokens to a segment.

Released code (coastalcph/hierarchical-transformers): lengths are whole segments, cut from the padded row; D adds a
learned code of the segment's number each time, and puts its result in the place of the summary. Its ten layouts are
words S, SD and D: "SD", "S SD", "S S SD", "S SD D", and as many early, late or in the middle.

Here: in SD, D is a second attention with projections of its own in the layer of S, residual and behind a norm without
gain; both share the block's feed-forward part. "S D" gives D a layer with a feed-forward part of its own, as in the
paper, through which all columns go. The code is a sinusoid, added once: there is no most number of segments.
Heads read tokens, hence the sum after the last layer, without which the last D would be lost. The causal form is ours.
Segments are counted over the valid tokens of each document; the last may be shorter, and causal it has no summary yet.
Positions of layers are by embedding; `inner` puts other mechanisms around the summaries.

When: for what depends on a little of each part of a long text: the state of a machine, a topic, a verdict. One summary
is all that leaves a segment, so that exact recall of many things from far away is not for it. `task=flip_flop
model=tiny attention.segment_length=8` (one seed, a bit remembered over up to 128 tokens): 98.2 %; with layout=S alone
50.5 %, chance; full 99.1 %, longformer with window=8 66.8 %. `task=mqar`, recall of many pairs, in the same way: 18.0 %
where full has 99.8 % after half of the steps. Two-sided, with segments of 8 and layout="S SD": task=brackets 68.4 %,
full 68.6 %; task=marked, whether two symbols anywhere are equal, 47.7 %, which is chance, where full has 99.9 %.

Checked: against loops over documents, segments and queries in float64, outputs and gradients
(tests/references/hierarchical.py), up to 1e-12; the two-sided layer on whole segments also against torch's attention
over a reshaped batch, as the released code lays it, up to 1e-12 (tests/test_hierarchical.py). That code is no package
and was not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.attention.segments import Segments
from attention_zoo.attention.summaries import Summaries
from attention_zoo.contract import Output, Source, Tokens
from attention_zoo.layout.host import Array, Host, before, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.model.wrapper import Nested, Wrapper
from attention_zoo.options import SegmentLength
from attention_zoo.positions.sinusoidal import Sinusoidal

Kinds = Annotated[str, Field(pattern=r"^(SD?|D)( (SD?|D))*$", description="words S, SD and D, one a layer")]


class Hierarchical(Wrapper):
    """Summaries of segments, put into a stack of layers within segments and among summaries.

    Args:
        segment_length: tokens of a segment.
        layout: the kinds of the layers, tiled over depth: S (within segments), D (among summaries) or SD (both, one
            after the other). The paper's: interleaved "S SD" or "SD", early "SD SD S S", late "S S SD SD".
        inner: the mechanisms themselves in the place of `layout`; any take the summaries as columns. Null: of `layout`.
        shared: the options of `Attention`, for the mechanisms inside.
    """

    name = "hierarchical"
    tiny = {"segment_length": 4}
    companions = {
        "segments": "attention_zoo.attention.segments.Segments",
        "summaries": "attention_zoo.attention.summaries.Summaries",
    }
    usual = Segments

    def __init__(self, *, segment_length: SegmentLength = 128, layout: Kinds = "SD", inner: Any = None, **shared: Any):
        if inner is None and " " in layout:
            raise ValueError(f"layout must be one word around a single layer, got {layout!r}; a stack takes several")
        if "S" not in layout:
            raise ValueError(f"layout must hold an S, without which no summary reads its segment, got {layout!r}")
        options = {"inner": inner, "segment_length": segment_length, "layout": layout}
        super().__init__(inner=self.inside_of(options), **shared)
        self.segment_length, self.layout = segment_length, layout
        self.summary = nn.Parameter(torch.randn(self.dim))

    @classmethod
    def inside_of(cls, options: Mapping[str, Any]) -> Any:
        """See `Wrapper`: what `layout` says."""
        if options["inner"] is not None:
            return options["inner"]
        size = options["segment_length"]
        return [
            {"name": Summaries.name, "segment_length": size}
            if kind == "D"
            else {"name": Segments.name, "segment_length": size, "document": kind == "SD"}
            for kind in options["layout"].split()
        ]

    def pairs(self, length: int) -> float | None:
        """See `Attention`; of one layer."""
        if not isinstance(self.inner, Segments):
            return None
        summaries = length // self.segment_length if self.causal else -(-length // self.segment_length)
        return self.inner.pairs(length + summaries)

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Nested | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        x, layout = self.enter(x, tokens, state, source)
        x, wide = self._insert(x, layout)
        before = None if state is None else state.inner
        out = self.inside(x, wide.layout, state=before, source=source, choices=choices)
        hidden = _taken(out.hidden, wide.columns)
        if not self.causal:
            hidden = hidden + _taken(out.hidden, wide.summary)
        return out._replace(hidden=hidden, state=None if state is None else Nested((), out.state))

    # how wide rows become is decided on the host; as torch.compiler.disable, without loading the compiler
    @torch._disable_dynamo
    def _insert(self, x: Float[Tensor, "B L E"], layout: Layout) -> tuple[Float[Tensor, "B L2 E"], Inserted]:
        """x with the summaries, and where all went."""
        B, L, E = x.shape
        key = ("segments", self.segment_length, self.causal)
        found = layout.plan(key, lambda: _inserted(layout, self.segment_length, self.causal))
        wide = x.new_zeros(B, found.layout.valid.shape[1], E).scatter(1, found.columns[..., None].expand(B, L, E), x)
        code = Sinusoidal(dim=E)(found.number) if E % 2 == 0 else 0
        return wide.index_put((found.row, found.target), (self.summary + code).to(x.dtype)), found


def _taken(x: Float[Tensor, "B L2 E"], columns: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
    return x.gather(1, columns[..., None].expand(*columns.shape, x.shape[-1]))


class Inserted(NamedTuple):
    """Where the summaries of a call's segments go, N of them.

    Fields:
        layout: of all columns, the new ones among them: of every segment_length + 1 positions one is a summary's.
        columns: [B, L], where each column went.
        summary: [B, L], two-sided: where the summary of its segment is; any at padding.
        row, target, number: of each summary: its place, and which of its document's it is.
    """

    layout: Layout
    columns: Int[Tensor, "B L"]
    summary: Int[Tensor, "B L"]
    row: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    number: Int[Tensor, " N"]


def _inserted(layout: Layout, size: int, causal: bool) -> Inserted:
    host, device = layout.host, layout.valid.device
    B, L = host.valid.shape
    number = host.position // size
    # the token that a summary stands next to: behind the last of a segment, or before the first
    marks = host.valid & (host.position % size == size - 1) if causal else host.valid & _begins(host, number)
    added = marks.cumsum(1, dtype=np.int64)
    columns = np.arange(L) + (added - marks if causal else added)
    width = L + int(added[:, -1].max(initial=0))
    row, column = marks.nonzero()
    newest = np.maximum.accumulate(np.where(marks, columns - 1, 0), 1)
    target = columns[row, column] + (1 if causal else -1)

    def spread(field: Array, extra: Array | bool) -> Array:
        out = np.zeros((B, width), field.dtype)
        np.put_along_axis(out, columns, field, 1)
        out[row, target] = extra
        return out

    # a causal summary is there once its segment is complete
    length = host.length + (host.length // size if causal else -(-host.length // size))
    numbers = number[row, column]
    wide = Host(
        spread(host.position + number + (not causal), numbers * (size + 1) + (size if causal else 0)),
        spread(host.valid, True),
        spread(host.is_global, False),
        spread(host.document, host.document[row, column]),
        spread(length, length[row, column]),
    )
    places = (tensor_of(each, device) for each in (columns, newest, row, target, numbers))
    return Inserted(Layout.known(wide, device), *places)


def _begins(host: Host, number: Array) -> Array:
    """Which tokens are the first of their segment."""
    earlier = before(host.valid)
    at = earlier.clip(min=0)
    same = [np.take_along_axis(field, at, 1) == field for field in (host.document, number)]
    return (earlier < 0) | ~(same[0] & same[1])
