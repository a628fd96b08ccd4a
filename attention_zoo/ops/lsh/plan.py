"""What a call of hashed attention is, but for its vectors. Letters as in ops/lsh/chunks.py."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from attention_zoo.ops.lsh.layout import ChunkLayout, sort_tokens


class HashedPlan(NamedTuple):
    """One call of LSH attention, but for its vectors.

    Fields:
        layout: of the M tokens.
        buckets: [H, R, M]; None: nobody asks for them any more.
        inside: whether a token attends inside its buckets only; else as far as the windows go.
        asked: [m], the tokens whose output is wanted; None: all.
        causal: whether a token sees earlier ones only. Order in the ragged list is order in time.
        scale: factor on q·k.
        epsilon: k = q / sqrt(|q|² + D·epsilon).
        once: whether a key met in several rounds counts once.
        order: [H, R, M], tokens in sorted order; None: see `sorted`.
    """

    layout: ChunkLayout
    buckets: Int[Tensor, "H R M"] | None
    inside: bool
    asked: Int[Tensor, " m"] | None
    causal: bool
    scale: float
    epsilon: float
    once: bool
    order: Int[Tensor, "H R M"] | None = None

    def sorted(self) -> HashedPlan:
        """With the order of tokens; as int32, since it is kept for backward."""
        assert self.buckets is not None
        return self._replace(order=sort_tokens(self.buckets, self.layout.document).int())
