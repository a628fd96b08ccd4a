"""Position-wise feed-forward, whole or in chunks along the length. Vaswani et al. 2017, §3.3; SwiGLU: Shazeer 2020.

In chunks (Kitaev et al. 2020, §3) only one chunk's wide activations exist at a time: each is recomputed in backward, so
that their memory falls by the number of chunks at the price of a second forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_zoo.contract import Layer, Output, Source, Tokens
from attention_zoo.options import Named, Positive, checked
from attention_zoo.rules import OneOf, named, shown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}
"""`gelu_tanh` is the approximation that GPT-2 and BigBird were trained with (Hendrycks & Gimpel 2016)."""
KINDS = (*ACTIVATIONS, "swiglu")
NONE = "none"
"""The word for blocks without a feed-forward."""


def with_flat(feed_forward: Named, *, ff_mult: int | None, ff_chunks: int | None) -> Named:
    """The option `feed_forward` with what its older, flat form says: `ff_mult` is its mult, `ff_chunks` its chunks.

    Raises:
        ValueError: if both forms say something.
    """
    name, options = named("feed_forward", feed_forward)
    flat = {key: value for key, value in {"mult": ff_mult, "chunks": ff_chunks}.items() if value is not None}
    for key, value in flat.items():
        if key in options:
            raise ValueError(f"ff_{key} is feed_forward's {key}, got {value} beside {shown(options[key])}; give one")
    return {"name": name, **flat, **options} if flat else feed_forward


class FeedForward(Layer):
    """E -> wide -> E. No dropout inside, and no state.

    Args:
        dim: model width E.
        kind: gelu | gelu_tanh | relu | silu | swiglu. A swiglu has three matrices and is 2/3 as wide, so that
            parameters stay equal.
        mult: width of the hidden layer over E.
        chunks: number of pieces along the length in which it runs; more save memory.
        width: of the hidden layer exactly; mult has no say then.
        bias: whether the matrices have one.
    """

    travels = ""
    options = ("mult", "chunks", "width", "bias")

    @checked(prefix="feed_forward.")
    def __init__(
        self,
        *,
        dim: Positive,
        kind: Annotated[str, OneOf(*KINDS), Field(title="feed_forward")] = "gelu",
        mult: Positive = 4,
        chunks: Positive = 1,
        width: Positive | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.kind, self.chunks = kind, chunks
        if width is None:
            width = mult * dim
            if kind == "swiglu":
                width = -(-width * 2 // 3 // 8) * 8  # a multiple of 8 suits the hardware
        self.into = nn.Linear(dim, width * (2 if kind == "swiglu" else 1), bias=bias)
        self.out = nn.Linear(width, dim, bias=bias)

    def initial_state(self, batch_size: int) -> tuple[()]:
        return ()

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: tuple[()] | None = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        if self.chunks == 1:
            return Output(self._apply_to(x), state)
        pieces = x.chunk(self.chunks, 1)
        if torch.is_grad_enabled():
            done = [checkpoint(self._apply_to, p, use_reentrant=False, preserve_rng_state=False) for p in pieces]
        else:
            done = [self._apply_to(piece) for piece in pieces]
        return Output(torch.cat(done, 1), state)

    def _apply_to(self, x: Tensor) -> Tensor:
        wide = self.into(x)
        if self.kind == "swiglu":
            gate, value = wide.chunk(2, -1)
            return self.out(nn.functional.silu(gate) * value)
        return self.out(ACTIVATIONS[self.kind](wide))
