"""Relative effective context length (RECL): how much context a group of language models makes use of.

Dai et al. 2019, "Transformer-XL", §4.3 and appendix C. With l_i(c, t) the loss of model i on token t after exactly c
tokens, for a context c and a longer one c':

    b(c, t)    = min over the group of l_i(c, t)                                    what c tokens can give
    T          = the share r of all t with the largest b(c, t)                      where c tokens do not suffice
    f_i(c, c') = mean over T of min(b(c, t), l_i(c', t))                            relative loss
    g_i(c, c') = (exp f_i(c, c) - exp f_i(c, c')) / exp f_i(c, c)                   relative gain

and the RECL of model i is the first c at which the next longer context gains less than a threshold. All models have to
improve over the same baseline, so that a poor model with much to gain does not look as if it used more. It is a figure
of the group and of the grid of contexts: with another step, or other models beside, it is another. And f keeps of each
token the better of two losses: one that merely fluctuates from context to context gains, too, so that of models that
were trained briefly the figure says little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from attention_zoo.place import place_of

THRESHOLD = 0.01
SHARES = (0.1, 0.5, 1.0)
"""The paper's: of the relative gain, and of the positions."""

Losses = Mapping[str, Mapping[int, Sequence[float]]]


class Reach(NamedTuple):
    """What one model makes use of.

    Fields:
        tokens: its RECL.
        falls: False where even the longest context gained the threshold: it uses at least so many.
        gains: of each context over the one before, g_i(c, c') for all neighbours of the grid.
    """

    tokens: int
    falls: bool
    gains: list[float]


def relative_context(losses: Losses, *, share: float, threshold: float = THRESHOLD) -> dict[str, Reach]:
    """The RECL of each model of a group.

    Args:
        losses: of each model at each context, of the same tokens in the same order, in nats.
        share: r, of the tokens that count; at least one does.
        threshold: of the relative gain.

    Raises:
        ValueError: for a share or threshold that is none, fewer than two contexts, models with other contexts or
            tokens, or a loss that is not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if not 0 < threshold < 1:  # at 0 rounding would decide
        raise ValueError(f"threshold must be above 0 and below 1, got {threshold}")
    contexts, table = _table(losses)
    tokens = table.shape[2]
    most = math.ceil(share * tokens)
    gains = []
    for place in range(len(contexts) - 1):
        baseline = table[:, place].min(0)
        hardest = np.argsort(-baseline, kind="stable")[:most]  # equal ones in the order of the text
        before = baseline[hardest].mean()
        after = np.minimum(baseline, table[:, place + 1])[:, hardest].mean(1)
        gains.append(-np.expm1(after - before))
    return {name: _reach(contexts, [float(each[i]) for each in gains], threshold) for i, name in enumerate(losses)}


def _table(losses: Losses) -> tuple[list[int], np.ndarray]:
    """The contexts in rising order, and losses [models, contexts, tokens]."""
    if not losses:
        raise ValueError("losses must be of at least one model, got none")
    contexts = sorted(next(iter(losses.values())))
    if len(contexts) < 2:
        raise ValueError(f"losses must be at two contexts or more, got {contexts}")
    for name, mine in losses.items():
        if sorted(mine) != contexts:
            raise ValueError(f"losses of {name} must be at the contexts of the others, {contexts}, got {sorted(mine)}")
    many = {len(line) for mine in losses.values() for line in mine.values()}
    if len(many) != 1 or 0 in many:
        raise ValueError(f"losses must be of the same tokens for all models and contexts, got {sorted(many)} tokens")
    table = np.array([[mine[context] for context in contexts] for mine in losses.values()], dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError("losses must be finite")
    return contexts, table


def _reach(contexts: list[int], gains: list[float], threshold: float) -> Reach:
    for context, gain in zip(contexts, gains):
        if gain < threshold:
            return Reach(context, True, gains)
    return Reach(contexts[-1], False, gains)


def places_for(ends: np.ndarray, longest: int, most: int) -> np.ndarray:
    """Which tokens are asked for: at most `most`, evenly over the text, each with `longest` before it in its document.

    Args:
        ends: where each document ends.

    Raises:
        ValueError: where no document is so long.
    """
    starts = np.concatenate([[0], ends[:-1]])
    room = np.maximum(ends - starts - longest, 0)
    total = int(room.sum())
    if not total:
        raise ValueError(
            f"contexts must be shorter than a document, got {longest} tokens where the longest document has "
            f"{int((ends - starts).max(initial=0))}"
        )
    picked = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
    before = np.cumsum(room)
    document = np.searchsorted(before, picked, side="right")
    return starts[document] + longest + picked - (before - room)[document]


@torch.no_grad()
def losses_after(
    model: nn.Module, text: np.ndarray, places: np.ndarray, context: int, *, batch_tokens: int
) -> list[float]:
    """The loss in nats of each token, after exactly `context` tokens, which stand at positions 0, 1, ...

    A row for each token, and in memory one batch of rows at a time.

    Args:
        model: causal, with logits for each token; in evaluation mode.
        text: token ids.
        places: of the tokens that are asked for, each at least `context`.
        batch_tokens: of one call, at most; one row is read in any case.
    """
    return [loss for found in _batches(model, text, places, context, batch_tokens) for loss in found.tolist()]


def _batches(
    model: Any, text: np.ndarray, places: np.ndarray, context: int, batch_tokens: int
) -> Iterator[torch.Tensor]:
    rows = max(1, batch_tokens // context)
    device, _ = place_of(model)
    for first in range(0, len(places), rows):
        asked = places[first : first + rows]
        ids = torch.from_numpy(text[asked[:, None] + np.arange(-context, 0)].astype(np.int64)).to(device)
        logits = model(ids).logits[:, -1]
        targets = torch.from_numpy(text[asked].astype(np.int64)).to(device)
        exact = logits if logits.element_size() == 8 else logits.float()
        yield functional.cross_entropy(exact, targets, reduction="none").double().cpu()
