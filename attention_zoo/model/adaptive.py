"""Adaptive embedding and softmax: rare tokens have narrow vectors, and their clusters one entry in the first softmax.

Grave et al. 2017; Baevski & Auli 2019. The vocabulary, sorted by frequency, is cut into clusters at `cutoffs`. The i-th
has a table of width / divide^i, and a projection to the model's width:

    x(token)   = √E · P_i T_i[token]
    p(token)   = softmax over [cluster 0, one entry for each other cluster] · softmax within the cluster
    logit_i    = T'_i P'_iᵀ h + b_i                                 T' and P' may be T and P

With divide=1 one table and one projection serve all clusters, and there is no projection where width is E.

All logits are computed, also those of rare clusters: that is for evaluation and generation. Training a large vocabulary
in this form saves parameters and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo.ops.dropout import Dropout
from attention_zoo.options import Factor, Natural, Positive, Probability, checked

Mask: TypeAlias = Bool[Tensor, "B L"] | None
"""Some of a call's tokens; None: all."""


class AdaptiveEmbedding(nn.Module):
    """Ids -> vectors.

    Args:
        vocab: number of token ids.
        dim: model width E.
        cutoffs: ascending ids at which the clusters after the first begin; none: one cluster.
        divide: each cluster's width is the one before over this.
        width: of the first cluster; default E.
        scale: factor on a token's vector; default √E.
        dropout: probability to drop a channel.
    """

    options = ("cutoffs", "divide", "width", "scale", "dropout")
    types: None = None

    @checked(prefix="embedding.")
    def __init__(
        self,
        *,
        vocab: Positive,
        dim: Positive,
        cutoffs: Sequence[Natural],
        divide: Positive = 1,
        width: Positive | None = None,
        scale: Factor | None = None,
        dropout: Probability = 0.0,
    ):
        super().__init__()
        width = dim if width is None else width
        self.borders = (0, *cutoffs, vocab)
        if any(high <= low for low, high in pairwise(self.borders)):
            raise ValueError(f"embedding.cutoffs must rise between 0 and vocab={vocab}, got {list(cutoffs)}")
        if width // divide ** (clusters := len(cutoffs)) < 1:
            raise ValueError(
                f"embedding.width {width} over divide={divide} to the power of {clusters} leaves the last cluster none"
            )
        self.num_embeddings, self.embedding_dim, self.divide = vocab, dim, divide
        self.scale = dim**0.5 if scale is None else scale
        sizes = [high - low for low, high in pairwise(self.borders)] if divide > 1 else [vocab]
        self.widths = [width // divide**index for index in range(clusters + 1)]
        tables = [nn.Embedding(size, self.widths[index]) for index, size in enumerate(sizes)]
        self.tables: Any = nn.ModuleList(tables)
        self.projections = nn.ParameterList()
        if divide > 1 or width != dim:
            self.projections.extend(torch.empty(dim, table.embedding_dim).normal_(std=dim**-0.5) for table in tables)
        for table in tables:
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
        self.dropout = Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The first table: for its device and dtype."""
        return self.tables[0].weight

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        places: Float[Tensor, "#B L E"] | None = None,
        types: None = None,
        valid: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L E"]:
        """See `TokenEmbedding`."""
        parts: list[Tensor] = []
        for index, table in enumerate(self.tables):
            low, size = self.borders[index], table.num_embeddings
            part = table((ids - low).clamp(0, size - 1))
            if self.projections:
                part = part @ self.projections[index].T
            parts.append(part.masked_fill(((ids < low) | (ids >= low + size))[..., None], 0))
        x = sum(parts[1:], parts[0]) * self.scale
        return self.dropout(x if places is None else x + places.to(x.dtype))


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities over the vocabulary, [B, L, V], or [n, V] of those tokens that are answered.

    Args:
        embedding: of the input tokens, whose clusters it shares.
        tied: whether its tables are the output matrices, too.
        tied_projections: whether each cluster's projection is that of the embedding; one word for all, or one each.
    """

    options = ("tied_projections",)

    @checked(prefix="head.")
    def __init__(self, embedding: AdaptiveEmbedding, *, tied: bool, tied_projections: bool | Sequence[bool] = True):
        super().__init__()
        clusters = len(embedding.widths)
        shared = [tied_projections] * clusters if isinstance(tied_projections, bool) else list(tied_projections)
        if len(shared) != clusters:
            raise ValueError(
                f"head.tied_projections must be one word, or one for each of {clusters} clusters, got {shared}"
            )
        dim, tables = embedding.embedding_dim, embedding.tables
        self.borders = embedding.borders
        self.weights = nn.ParameterList(
            table.weight if tied else torch.empty_like(table.weight).normal_(std=0.02) for table in tables
        )
        self.biases = nn.ParameterList(torch.zeros(table.num_embeddings) for table in tables)
        self.projections = nn.ParameterList()
        if embedding.projections:
            for index in range(clusters):
                theirs = embedding.projections[index if embedding.divide > 1 else 0]
                self.projections.append(theirs if shared[index] else torch.empty_like(theirs).normal_(std=dim**-0.5))
        self.clusters = nn.Linear(embedding.widths[0], clusters - 1) if clusters > 1 else None

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> Float[Tensor, "*at V"]:
        hidden = hidden if answered is None else hidden[answered]
        first = self._logits(hidden, 0)
        if self.clusters is None:
            return first.log_softmax(-1)
        entries = self.clusters(hidden @ self.projections[0] if self.projections else hidden)
        first, entries = torch.cat([first, entries], -1).log_softmax(-1).split([first.shape[-1], entries.shape[-1]], -1)
        rest = [
            entry[..., None] + self._logits(hidden, index).log_softmax(-1)
            for index, entry in enumerate(entries.unbind(-1), 1)
        ]
        return torch.cat([first, *rest], -1)

    def _logits(self, hidden: Tensor, cluster: int) -> Tensor:
        """Of one cluster's tokens."""
        x = hidden @ self.projections[cluster] if self.projections else hidden
        if len(self.weights) == 1:
            rows = slice(*self.borders[cluster : cluster + 2])
            return nn.functional.linear(x, self.weights[0][rows], self.biases[0][rows])
        return nn.functional.linear(x, self.weights[cluster], self.biases[cluster])
