"""What enters the stack: a vector for each token, plus one for its place and one for its type.

Drawn at E^-1/2 and scaled by √E when read (Vaswani et al. 2017, §3.4), so that tied logits start at unit scale. BERT
(Devlin et al. 2019, §3.2) scales nothing, adds a vector for the segment that a token belongs to, and norms the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.contract import known_options
from attention_zoo.model.adaptive import AdaptiveEmbedding
from attention_zoo.model.norm import build_norm, normed
from attention_zoo.ops.dropout import Dropout
from attention_zoo.options import Factor, Named, Natural, Positive, Probability, checked


class TokenEmbedding(nn.Embedding):
    """Ids -> vectors.

    Args:
        vocab: number of token ids.
        dim: model width E.
        scale: factor on a token's vector; default √E.
        types: number of token types; 0: there are none.
        normed: whether the sum goes through a norm.
        norm: of which kind; see `build_norm`.
        dropout: probability to drop a channel of the sum.
    """

    options = ("scale", "types", "normed", "dropout")

    @checked(prefix="embedding.")
    def __init__(
        self,
        *,
        vocab: Positive,
        dim: Positive,
        scale: Factor | None = None,
        types: Natural = 0,
        normed: bool = False,
        norm: Named = "layer",
        dropout: Probability = 0.0,
    ):
        super().__init__(vocab, dim)
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.scale = dim**0.5 if scale is None else scale
        self.types = nn.Embedding(types, dim) if types else None
        self.norm = build_norm(norm, dim) if normed else None
        self.dropout = Dropout(dropout)

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        places: Float[Tensor, "#B L E"] | None = None,
        types: Int[Tensor, "B L"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L E"]:
        """Sum of what there is.

        Args:
            ids: in [0, vocab).
            places: vectors of the positions.
            types: in [0, types); default 0 everywhere.
            valid: False at padding, for a norm over the batch; default all.
        """
        x = super().forward(ids) * self.scale
        if places is not None:
            x = x + places.to(x.dtype)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        if self.norm is not None:
            x = normed(self.norm, x, valid)
        return self.dropout(x) if self.dropout.p else x


def build_embedding(
    options: Mapping[str, Any], *, vocab: int, dim: int, norm: Named
) -> TokenEmbedding | AdaptiveEmbedding:
    """With an option `cutoffs` an `AdaptiveEmbedding`, else a `TokenEmbedding`; `options` are its own."""
    if "cutoffs" in options:
        known_options("embedding with cutoffs", options, AdaptiveEmbedding.options)
        return AdaptiveEmbedding(vocab=vocab, dim=dim, **options)
    known_options("embedding", options, TokenEmbedding.options)
    return TokenEmbedding(vocab=vocab, dim=dim, norm=norm, **options)
