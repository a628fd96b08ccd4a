"""What is read off the last hidden states: tokens, a label for each token, one for the row, or tokens and one label.

Where few tokens are scored (masked ones, answers of recall), logits of the others would be most of a step's work and of
its memory: heads that speak of each token do so of those alone that are `answered`.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attention_zoo.contract import known_options, named, of_tensor, one_of
from attention_zoo.model.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Mask
from attention_zoo.model.embedding import TokenEmbedding
from attention_zoo.model.feed_forward import ACTIVATIONS
from attention_zoo.model.norm import build_norm, normed
from attention_zoo.options import Named, Positive, checked
from attention_zoo.rules import OneOf

HEADS = ("lm", "tokens", "classify", "pretraining", "hidden")
POOLINGS = ("mean", "first")


class LanguageModel(nn.Module):
    """Logits over the vocabulary, [B, L, V], or [n, V] of those tokens that are answered.

    Args:
        embedding: of the input tokens.
        dim: width of the hidden states.
        tied: whether its table is the output matrix too.
        bias: whether each token of the vocabulary has one.
        transform: an activation: a layer of that kind, E -> E, and a norm come first (BERT's head). Default none.
        norm: of the transform; see `build_norm`.
    """

    options = ("bias", "transform")

    @checked(prefix="head.")
    def __init__(
        self,
        embedding: TokenEmbedding,
        *,
        dim: Positive,
        tied: bool,
        bias: bool = False,
        transform: Annotated[str, OneOf(*ACTIVATIONS)] | None = None,
        norm: Named = "layer",
    ):
        super().__init__()
        vocab = embedding.num_embeddings
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(vocab, dim).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(vocab)) if bias else None
        self.transform = None if transform is None else _Transform(dim, transform, norm)

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> Float[Tensor, "*at V"]:
        if self.transform is not None:  # of all tokens: its norm may be over them
            hidden = self.transform(hidden, valid)
        return nn.functional.linear(hidden if answered is None else hidden[answered], self.weight, self.bias)


class _Transform(nn.Module):
    """norm(activation(linear(x)))."""

    def __init__(self, dim: int, activation: str, norm: Named):
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), build_norm(norm, dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B L E"]:
        return normed(self.norm, ACTIVATIONS[self.activation](self.dense(x)), valid)


class TokenLabels(nn.Module):
    """Logits over the classes for each token, [B, L, C], or [n, C] of those that are answered."""

    def __init__(self, *, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> Float[Tensor, "*at C"]:
        return self.linear(hidden if answered is None else hidden[answered])


class Classify(nn.Module):
    """Logits over the classes for each row, [B, C].

    Args:
        pooling: "mean" over the row's valid tokens, or its "first" valid token.
    """

    def __init__(self, *, dim: int, classes: int, pooling: str):
        super().__init__()
        self.pooling = pooling
        self.linear = nn.Linear(dim, classes)

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> Float[Tensor, "B C"]:
        return self.linear(self._pool(hidden, valid))

    def _pool(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        if self.pooling == "first":
            column = torch.zeros_like(hidden[:, 0, 0], dtype=torch.long) if valid is None else valid.long().argmax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), column]
        if valid is None:
            return hidden.mean(1)
        total = hidden.masked_fill(~valid[..., None], 0).sum(1)
        return total / valid.sum(1, keepdim=True).clamp(min=1)


class PretrainingLogits(NamedTuple):
    """Two answers of one model: [B, L, V] for the tokens (or [n, V], see `LanguageModel`), [B, C] for the row."""

    tokens: Float[Tensor, "*at V"]
    row: Float[Tensor, "B C"]


class Pretraining(nn.Module):
    """Tokens and one label for the row, as BERT is trained; see `LanguageModel` and `Classify`."""

    def __init__(self, tokens: LanguageModel, row: Classify):
        super().__init__()
        self.tokens, self.row = tokens, row

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> PretrainingLogits:
        return PretrainingLogits(self.tokens(hidden, valid, answered), self.row(hidden, valid))


class Hidden(nn.Module):
    """No logits."""

    def forward(self, hidden: Float[Tensor, "B L E"], valid: Mask, answered: Mask = None) -> None:
        return None


@checked
def build_head(
    head: Named,
    embedding: TokenEmbedding | AdaptiveEmbedding,
    *,
    dim: Positive,
    classes: Positive | None,
    pooling: Annotated[str, OneOf(*POOLINGS)],
    causal: bool,
    tied: bool,
    norm: Named = "layer",
) -> nn.Module:
    """One of `HEADS`; "lm" has options, see `LanguageModel`, or `AdaptiveSoftmax` where the embedding is adaptive.

    "pretraining" has those of `LanguageModel` and needs classes; an adaptive embedding has none.

    Args:
        dim: width of the hidden states.

    Raises:
        ValueError: for an unknown word or option, or classes missing or without use.
    """
    head, options = named("head", head)
    one_of(HEADS, head=head)
    adaptive = isinstance(embedding, AdaptiveEmbedding)
    known = AdaptiveSoftmax.options if adaptive and head == "lm" else LanguageModel.options
    known_options(f"head={head}", options, known if head in ("lm", "pretraining") else ())
    if (head in ("tokens", "classify", "pretraining")) != (classes is not None):
        raise ValueError(
            "classes belongs to head=tokens, head=classify and head=pretraining, "
            f"got classes={classes} with head={head}"
        )
    if head == "pretraining" and adaptive:
        raise ValueError("head=pretraining needs an embedding without cutoffs: all logits are asked for at once")
    if head == "lm" and isinstance(embedding, AdaptiveEmbedding):
        if dim != embedding.embedding_dim:
            raise ValueError(
                f"an embedding with cutoffs needs hidden states as wide as embeddings, {embedding.embedding_dim}, "
                f"got {dim}; use reversible=true instead of both"
            )
        return AdaptiveSoftmax(embedding, tied=tied, **options)
    if head == "hidden":
        return Hidden()
    if head in ("classify", "pretraining") and pooling == "first" and causal:
        raise ValueError("pooling=first needs causal=False: a causal first token has seen nothing but itself")
    if head in ("lm", "pretraining"):
        assert isinstance(embedding, TokenEmbedding)
        if tied and dim != embedding.embedding_dim:
            raise ValueError(
                f"tied=True needs hidden states as wide as embeddings, {embedding.embedding_dim}, got {dim}"
            )
        model = LanguageModel(embedding, dim=dim, tied=tied, norm=norm, **options)
        if classes is None:
            return model
        return Pretraining(model, Classify(dim=dim, classes=classes, pooling=pooling))
    assert classes is not None
    if head == "tokens":
        return TokenLabels(dim=dim, classes=classes)
    return Classify(dim=dim, classes=classes, pooling=pooling)


def last_valid(hidden: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B 1 E"]:
    """Of the last valid token of each row; of any where there is none."""
    if valid is None or hidden.shape[1] == 1:
        return hidden[:, -1:]
    column = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), 0).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), column][:, None]


def check_answered(answered: Tensor, ids: Tensor, last_only: bool) -> None:
    """That it tells which of a call's tokens have logits."""
    if answered.dtype != torch.bool or answered.shape != ids.shape:
        raise ValueError(f"answered must be a bool mask of ids' shape {tuple(ids.shape)}, got {of_tensor(answered)}")
    if last_only:
        raise ValueError("answered needs last_only=False, which asks for one token of each row")
