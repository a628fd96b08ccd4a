"""What mechanisms with relative positions and a memory of hidden states share. Dai et al. 2019, §3.3 and appendix B.

    score_ij = scale · [(W_q x_i + u)·W_k h_j + (W_q x_i + v)·W_r R_{i-j}]

R_d = [sin(d·f) || cos(d·f)], f_i = 10000^(-2i/E). W_k and W_v learn from the hidden states h of the memory, earlier
hidden states do not: the state holds them detached. u and v are one pair a head, shared over depth (`untie_r`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.closing import Closing
from attention_zoo.attention.operator import one_operator
from attention_zoo.contract import Abilities, Output, Source, at_least
from attention_zoo.layout.halo import halo
from attention_zoo.layout.host import Array
from attention_zoo.layout.kernel import Kernel, explain
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, behind, none
from attention_zoo.layout.visible import runs_of
from attention_zoo.ops.exchange.halo import behind_halo
from attention_zoo.ops.relative.call import RelativeCall
from attention_zoo.ops.relative.few import Few, absorbed
from attention_zoo.ops.relative.waves import falling_waves, waves
from attention_zoo.options import Natural, Positive
from attention_zoo.place import place_of
from attention_zoo.tokens import Tokens


class RelativeAttention(Closing):
    """Base of attention to the own segment and a memory. A mechanism says what a query sees: `_attended`, `_horizon`.

    Args:
        segment_length: S, tokens per segment.
        memory_length: M, tokens visible before the own segment.
        untie_r: give each layer its own u and v, instead of one pair shared over depth.
        kernel: "auto" takes the first of `kernels` that fits.
        shared: the options of `Attention`. `positions` may be "none" or "relative", which mean the same here: there
            are always its own. `bias` does not concern W_r, which has none.
    """

    declared = Abilities(
        causality="strict",
        carry="prefix",
        two_sided=False,
        global_tokens="none",
        cross=False,
        compute="linear",
        activations="linear",
        state="constant",
        positions=("none", "relative"),
        adjustable=("segment_length", "memory_length"),
        truncated=True,
    )
    travels = "hidden states of the memory"
    kernels: ClassVar[tuple[Kernel[RelativeCall], ...]]
    """Fastest first."""
    shared_over_depth: tuple[str, ...] = ("u", "v")
    """Parameters that a stack ties over its layers of this kind."""
    clamp_length: int | None = None

    def __init__(self, *, segment_length: Positive, memory_length: Natural, untie_r: bool, kernel: str, **shared: Any):
        super().__init__(**shared)
        if self.dim % 2:
            raise ValueError(f"dim must be even for sines and cosines of distances, got {self.dim}")
        self.segment_length, self.memory_length, self.kernel = segment_length, memory_length, kernel
        if untie_r:
            self.shared_over_depth = ()
        width = self.heads * self.head_width
        self.to_q = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_k = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_v = nn.Linear(self.dim, width, bias=self.bias_into)
        self.to_r = nn.Linear(self.dim, width, bias=False)
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)
        self.u = nn.Parameter(torch.empty(self.heads, self.head_width).normal_(std=0.02))
        self.v = nn.Parameter(torch.empty(self.heads, self.head_width).normal_(std=0.02))

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """See `Layer`."""
        if isinstance(tokens, Layout) and tokens.goes_with(x, state, source, choices):
            return self._attended(self.to_q(x), x, tokens)
        return self._checked(x, tokens, state=state, source=source, choices=choices)

    @one_operator
    def _checked(
        self, x: Tensor, tokens: Tokens | None = None, *, state: Any = None, source: Any = None, choices: Any = None
    ) -> Output:
        x, layout = self.enter(x, tokens, state, source, choices)
        if state is None:
            return self._closed_up(lambda x, layout: self._attended(self.to_q(x), x, layout), x, layout)
        return self._attended(self.to_q(x), x, layout, state)

    def _attended(self, q: Tensor, x: Tensor, layout: Layout, state: Any = None) -> Output:
        """What a checked call returns; `q`: W_q x, [B, L, H·D]."""
        raise NotImplementedError

    # --- memory ----------------------------------------------------------------------------------------------------

    @property
    def _horizon(self) -> Horizon:
        """What the next token of each row's current document can still see."""
        raise NotImplementedError

    def _check_lengths(self) -> None:
        """At every call: they are adjustable."""
        at_least(1, segment_length=self.segment_length)
        at_least(0, memory_length=self.memory_length)

    def _nothing(self, batch_size: int) -> Columns:
        """Hidden states of no token."""
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        return Columns.of(none(batch_size, device), torch.zeros(batch_size, 0, self.dim, device=device, dtype=dtype))

    def _append(self, x: Tensor, layout: Layout, held: Columns | None) -> Columns:
        if layout.placement is not None:
            return self._fetched(x, layout, held)
        return Columns.of(layout, x) if held is None else held.append(layout, x, horizon=self._horizon)

    def _oldest_needed(self, position: Array) -> Array:
        """The oldest position of which the layer must know the hidden state, for a token there; maybe below 0."""
        raise NotImplementedError

    @property
    def _sees(self) -> tuple[Any, ...]:
        """All that `_oldest_needed` depends on."""
        raise NotImplementedError

    def _fetched(self, x: Tensor, layout: Layout, begun: Columns | None) -> Columns:
        """The columns of a process that has some of a sequence, behind what their first tokens remember of others'.

        Where a segment goes on in another process, its hidden states get their gradients there; where none does, none
        travel. So all processes run at once, wherever they were cut.
        """
        found = halo(layout, self._sees, self._oldest_needed, segment=self.segment_length)
        keys, x = found.keys, behind_halo(x, layout, found, "hidden states", learns=found.within)
        if begun is not None and begun.filled:
            first, blank = keys, begun.tokens
            keys = layout.plan(("begun", id(first), id(blank)), lambda: (behind(blank, first), first, blank))[0]
            x = torch.cat([begun.held[0].to(x.dtype), x], 1)
        return Columns.of(keys, x)

    def _settled(self, columns: Columns, layout: Layout) -> Columns:
        """What is kept of them after a call, detached: gradients never cross from one call into an earlier one."""
        (hidden,) = columns.buffers
        columns = columns._replace(buffers=(hidden.detach(),)) if hidden.requires_grad else columns
        return columns.settle(layout, horizon=self._horizon)[0]

    # --- scores ----------------------------------------------------------------------------------------------------

    def _call(self, x: Tensor, keys: Layout, lowest: int = 0, **more: Any) -> RelativeCall:
        """What kernels need to know of a call; `lowest`: the lowest position that there may be."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        projections = self.to_k, self.to_v, self.to_r
        consecutive = keys.implied or runs_of(keys, lowest).consecutive
        columns = keys.valid.shape[1]
        width, wanted = self.head_width, self.kernel
        return RelativeCall(x.shape[1], columns, width, x.device, dtype, consecutive, projections, wanted, **more)

    def _absorbed(self, q: Float[Tensor, "B H L D"], states: Float[Tensor, "B S E"], few: Few) -> Tensor:
        """See ops/relative/few.py."""
        with torch.autocast(q.device.type, enabled=False):
            exact = torch.promote_types(states.dtype, torch.float32)
            projections: Any = (self.to_k, self.to_r, self.to_v)
            table = self._waves(few.distances)
            out = absorbed(q.to(exact), states, projections, (self.u, self.v), table, few, scale=self.scale)
            return out.to(states.dtype)

    def _waves(self, distances: int, *, falling: bool = False) -> Float[Tensor, "n E"]:
        device, dtype = place_of(self)
        return (falling_waves if falling else waves)(distances, self.dim, self.clamp_length, dtype, device)

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """See `Attention`."""
        with torch.enable_grad():
            return explain(self.kernels, RelativeCall(length, length, self.head_width, device, dtype))
