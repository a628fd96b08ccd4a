"""Longformer: a sliding window, and a few global tokens. Beltagy, Peters & Cohan 2020, "Longformer", §3.1.

A token sees the tokens within `window` positions on each side (its own included), in steps of `dilation`, and every
global token; a global token sees everything, through query, key and value projections of its own. O(L·(window + G)).

    i sees j  if  |p_i - p_j| <= window · dilation and dilation divides p_i - p_j,
              or p_j < sinks,  or i or j is global;    causal: p_j <= p_i alone

Paper: w is the whole window, w / 2 on each side. Dilation may differ from head to head. Global attention is symmetric
and has projections of its own, which start as copies. Language models are causal, with windows that grow over depth.
Sinks (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", §3): a softmax must put its weight
somewhere, and trained models put what they do not need on the first tokens; a window that has left those behind breaks
down. Keep the first few (4) and stream without end at constant memory.

Released code (allenai; Hugging Face follows it): allenai's `attention_window` counts one side, Hugging Face's both.
Its chunked form has neither dilation nor a causal form. It takes the softmax in float32 whatever the dtype, and a
global query attends again with what was computed for its window, to be overwritten.
StreamingLLM counts positions inside the cache: between tokens of the window distances are those of the text, and to the
sinks they grow no more once the cache is full. It keeps keys without positions and turns them all at each step. gpt-oss
(OpenAI 2025; the same in transformers) learns for each head the score of one more key without a value, and its window
counts the query.

Here: `window` counts one side: Hugging Face's attention_window=512 is window=256. The causal form sees the `window`
tokens before a token, and itself, and global tokens of its past. Dilation is by head, works in every form, and costs no
more than a window without gaps (heads that share a key head but not a dilation excepted). As in the released code, a
key that is both global and in the window counts once, and non-global queries see global keys through the ordinary
projections. `global_projections="shared"` leaves the second projections out. Positions count tokens, not padding.
Sinks stand where they stand in the text by default: a model that is trained so learns the distances that it meets. With
`sink_positions="cache"` they stand as in StreamingLLM, for pretrained models whose positions end at their training
length: a query asks the sinks beyond its window turned by min(p_i, sinks + window · dilation), in a whole text as in a
stream, so that all cuts are one computation and no key is turned again. What stands between sinks and window is gone.
Heads share the cache: where dilation is by head, the largest of them counts for all.

Checked: against Hugging Face's Longformer (random windows, padding on either side and in holes, global tokens;
dilation on residue classes, since theirs has none) and local-attention (exact windows, causal and two-sided), in
tests/oracles/longformer.py. Largest error of outputs and gradients 7e-7 in float32 and 2e-15 in float64, 3e-7 where
theirs rounds its softmax to float32 (tests/oracles/README.md). `sink_logit` against transformers' gpt_oss, outputs and
gradients, to 1e-12 in float64 (tests/test_sink_logit.py); sinks against their definition, and a stream of 50 windows
against one call (tests/test_sinks.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.operator import refuse_export
from attention_zoo.attention.pattern import PatternAttention, hide
from attention_zoo.constants import constant
from attention_zoo.contract import Abilities, Tokens, Unsupported
from attention_zoo.layout.kernel import choose
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Band
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.absorbed import is_worth_it, with_absorbed_rows
from attention_zoo.ops.pattern.call import PatternCall, signed
from attention_zoo.ops.pattern.globals import dense_global_rows, global_rows, put_global_rows
from attention_zoo.ops.pattern.heads import reach_by_head
from attention_zoo.options import Natural, Positive
from attention_zoo.rules import OneOf


class Longformer(PatternAttention):
    """Sliding window attention with global tokens.

    Args:
        window: tokens per side; at least 1.
        sinks: first tokens of each document that all later ones see besides, and that a state never forgets (Xiao et
            al. 2023, "StreamingLLM"); causal alone.
        sink_positions: "text", or "cache" (the paper): rotary positions and alibi take no sink to be farther away than
            it is in a cache of sinks and window.
        dilation: step between the tokens of a window; one number, or one for each head. Reach is window · dilation.
        sink_logit: learn for each head the score of one more key, whose value is zero; see `full`.
        global_projections: "separate" (the paper), "shared", or "auto": separate, but in a model to which no token is
            global (`Transformer(global_tokens=False)`), where the second projections would be dead weight.
        kernel: auto | row | sdpa | short | flex | banded | xformers | tiles | dense.
        shared: the options of `Attention`.
    """

    name = "longformer"
    tiny = {"window": 3}
    spares_projections = False
    """Whether they are shared because no token is global, not because somebody asked for it."""
    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=True,
        global_tokens="first_call",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        positions=("none", "rotary", "alibi"),
        grouped_heads=True,
    )

    def __init__(
        self,
        *,
        window: Positive = 256,
        sinks: Natural = 0,
        sink_positions: Annotated[str, OneOf("text", "cache")] = "text",
        dilation: Positive | Sequence[Positive] = 1,
        sink_logit: bool = False,
        global_projections: Annotated[str, OneOf("auto", "separate", "shared")] = "auto",
        kernel: str = "auto",
        **shared: Any,
    ):
        super().__init__(sink_logit=sink_logit, kernel=kernel, **shared)
        if sinks and not self.causal:
            raise Unsupported(
                self.name, f"sinks={sinks} with causal=False", "sinks are for streams, which look back", "global tokens"
            )
        in_cache = sink_positions == "cache"
        if in_cache and (not sinks or self.positions == "none"):
            raise Unsupported(
                self.name, f"sink_positions=cache with sinks={sinks} and positions={self.positions}",
                "there are no sinks whose positions the scores depend on", "sink_positions=text",
            )  # fmt: skip
        steps = [dilation] * self.heads if isinstance(dilation, int) else list(dilation)
        if len(steps) != self.heads:
            raise ValueError(f"dilation must be one number or one for each of {self.heads} heads, got {len(steps)}")
        self.window, self.sinks, self.sink_positions = window, sinks, sink_positions
        self.global_projections = global_projections
        self.computes_apart = global_projections != "shared"
        if self.computes_apart:
            # they start as copies of the others
            self.to_q_global, self.to_k_global, self.to_v_global = map(deepcopy, (self.to_q, self.to_k, self.to_v))
        # heads that share a dilation share the mask
        self.dilation = steps[0] if len(set(steps)) == 1 else tuple(steps)
        self.reach = Band(window, stride=self.dilation, first=sinks, weights="uniform", in_cache=in_cache)

    def bias(self, queries: Tokens, keys: Tokens) -> Float[Tensor, "B #H L S"]:
        gap = (queries.position[:, :, None] - keys.position[:, None, :])[:, None]
        step: Any = self.dilation
        if not isinstance(step, int):
            step = constant(step, like=gap, dtype=torch.long, axes=3)  # by head
        seen = gap.abs() <= self.window * step
        if self.dilation != 1:
            seen = seen & (gap % step == 0)
        return hide(seen | (keys.position < self.sinks)[:, None, None] if self.sinks else seen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        extra = [name for name in state_dict if name.startswith(tuple(f"{prefix}to_{x}_global." for x in "qkv"))]
        if extra and not self.computes_apart and self.spares_projections:
            warnings.warn(
                f"{prefix}to_q_global, to_k_global and to_v_global are left out: this model has no global tokens "
                "(global_projections=separate keeps them)",
                stacklevel=2,
            )
            for name in extra:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def global_operands(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """See `PatternAttention`: of the second projections."""
        q, k, v = (self._heads(project(x)) for project in (self.to_q_global, self.to_k_global, self.to_v_global))
        return self.scheme.turn(q, layout), self.scheme.turn(k, layout), v

    def run(self, call: PatternCall, x: Tensor) -> Tensor:
        """With rows of global queries by the second projection; only computed where there are some."""
        if not (self.computes_apart and call.queries.any_global):
            return self._run(call, self.kernel)
        if call.q.numel() and self._runs_along(call):
            q, k, v = self.global_operands(x, call.queries)
            call.second = signed(q, self.scale), k, v
            return self._run(call, self.kernel)
        out = self._run(call, self.kernel)
        projections = self.to_q_global, self.to_k_global, self.to_v_global
        if self.kernel != "dense" and is_worth_it(call, *projections):
            turned: dict[str, Any] = {}
            if self.scheme.rotates:
                keys = self.scheme.turn(self._heads(self.to_k_global(x)), call.queries)
                turned = {"turn": self.scheme.rotate, "keys": keys}
            return with_absorbed_rows(call, out, x, projections, scale=self.scale, to_out=self.to_out, **turned)
        q, k, v = self.global_operands(x, call.queries)
        if earlier := call.k.shape[2] - x.shape[1]:
            # a global query's document begins in its call (checked before): it sees none of the keys before that
            k, v = (nn.functional.pad(y, (0, 0, earlier, 0)) for y in (k, v))
        return self._with_rows(call, out, q, k, v, self.kernel, self.scale)

    def _runs_along(self, call: PatternCall) -> bool:
        """Whether the kernel computes rows of global queries in the same call, as none does on a CPU."""
        if facts.on_cuda(call) is not None or reach_by_head(self.reach) is not None:
            return False
        return choose(self.name, self.kernels, self.kernel, call).along

    def attend(
        self,
        q: Float[Tensor, "B H L D"],
        k: Float[Tensor, "B K S D"],
        v: Float[Tensor, "B K S D"],
        queries: Tokens | None = None,
        keys: Tokens | None = None,
        *,
        scale: float | None = None,
        kernel: str | None = None,
        global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B H L D"]:
        """As of `PatternAttention`.

        Args:
            global_qkv: a second projection of the same tokens, for the rows of global queries.
        """
        if self.sink_positions == "cache" and not self.has_position_bias:
            raise Unsupported(
                self.name, "attend with sink_positions=cache", "queries that are given are turned for the text already",
                "the layer itself, or sink_positions=text",
            )  # fmt: skip
        if global_qkv is None:
            return super().attend(q, k, v, queries, keys, scale=scale, kernel=kernel)
        refuse_export(self.name)
        kernel, scale = self.kernel if kernel is None else kernel, self.scale if scale is None else scale
        call = self._call(q, k, v, queries, keys, scale)
        call.apart = True
        return self._with_rows(call, self._run(call, kernel), *global_qkv, kernel, scale)

    def _with_rows(
        self, call: PatternCall, out: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel: str, scale: float
    ) -> Tensor:
        if not (out.numel() and call.queries.any_global):
            return out
        rows = PatternCall(self, q, k, v, call.queries, call.keys, scale, call.learned, sink=call.sink)
        return put_global_rows(rows, out, (dense_global_rows if kernel == "dense" else global_rows)(rows))
