"""Small models for the tests of the skeleton: every mechanism at options at which short lengths are telling."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer
from attention_zoo.registry import recipe

VOCAB = 11
CAUSAL = [name for name in zoo.available() if recipe(name)[0].declared.causality != "none"]
TWO_SIDED = [name for name in zoo.available() if recipe(name)[0].declared.two_sided]
CARRYING = [name for name in CAUSAL if recipe(name)[0].declared.carry != "none"]
# LSH buckets depend on what follows: a stack of such layers is no function of the prefix alone
PREFIX = [name for name in CARRYING if recipe(name)[0].declared.causality == "strict"]
# a reversible stack runs its layers without gradients first, where a loss on hidden states is not made
REVERSIBLE = [name for name in CARRYING if not recipe(name)[0].token_losses]


def entry(name: str, **options: Any) -> dict[str, Any]:
    """The mechanism at its telling options, as `Transformer` takes it."""
    return {"name": name, **recipe(name)[0].tiny, **options}


def small(*names: str, **options: Any) -> Transformer:
    """A model of width 16 in float64 and evaluation mode, always the same for the same options."""
    torch.default_generator.manual_seed(7)
    shape = {"vocab": VOCAB, "dim": 16, "heads": 2, "depth": 2, "ff_mult": 2}
    return Transformer(**{"attention": [entry(name) for name in names], **shape, **options}).double().eval()


def paired(*lists: Iterable[Any]) -> list[tuple[Any, ...]]:
    """One of each list at a time, until each of all has stood beside some: far fewer than all with all."""
    kept = [list(each) for each in lists]
    return list(islice(zip(*map(cycle, kept)), max(map(len, kept))))


def some_ids(batch: int = 3, length: int = 23, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(length: int, counts: list[int], side: str) -> Tensor:
    """Valid columns: `counts` of each row, padded on that side."""
    column, count = torch.arange(length)[None], torch.tensor(counts)[:, None]
    return column < count if side == "right" else column >= length - count


def packed(valid: Tensor, *borders: int) -> Tokens:
    """Documents 0, 1, ... that change at these columns."""
    document = torch.bucketize(torch.arange(valid.shape[1]), torch.tensor(borders), right=True)
    return Tokens.of(valid, document=document.expand_as(valid))


def in_pieces(model: Any, ids: Tensor, tokens: Tokens | None, cuts: list[int], **first: Any) -> Tensor:
    """Logits of consecutive calls that hand their state on."""
    state, pieces = model.initial_state(len(ids)), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]]):
        part = slice(start, stop)
        out = model(ids[:, part], None if tokens is None else tokens.cut(part), state=state, **first)
        state, first = out.state, {}
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference."""
    return (one - other).detach().abs().max().item() if one.numel() else 0.0
