"""Marked pair: are the two marked symbols equal? A label for the row from two places anywhere in it.

    g c * a f b c * a e d . .        "*" marks the symbol after it, "." is padding; a and a: equal, 1

Rules: n symbols are drawn independently, two of their places at random, and a mark is put before each of these; the
label says whether the two symbols are equal, half of the rows each. Rows have a random number of tokens, from
`shortest` to the row's length, and are padded on the right. Only the marks say which symbols are meant: the row's bag
of symbols is drawn before the label, and the second marked symbol is exchanged with one of the same row, so that
counting symbols says nothing.

Source: our own; it is the equality test of "same or different" stimuli (Kim et al. 2018, "Not-So-CLEVR", §1) on a line,
with the smallest evidence that is not local. Chance and trivial baselines: 50 % for "repeated" (some neighbours are
equal), "most" (one symbol is more frequent than is expected) and "near" (the marks are close to each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Positive, checked
from attention_zoo.tasks.generated import Generated, of
from attention_zoo.tasks.task import Batch

PAD, MARK = 0, 1
SPECIAL = 2
"""Ids below it are no symbols."""


class Marked(Generated):
    """Whether two marked symbols are equal.

    Args:
        symbols: number of different symbols.
        shortest: tokens of the shortest rows, marks included; more than `symbols` + 2, so that a symbol comes twice.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "marked"
    objective = "classify"
    classes = 2
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        symbols: Annotated[int, Field(ge=2, le=2**20)] = 4,
        shortest: Annotated[int, Field(ge=5, le=2**24)] = 16,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.symbols, self.shortest, self.test, self.test_examples = symbols, shortest, test, test_examples
        self.vocab = SPECIAL + symbols
        if shortest < symbols + 3:
            raise ValueError(f"shortest must be at least symbols + 3, {symbols + 3}, got {shortest}")

    def check(self, seq_len: int) -> None:
        self.need(seq_len, self.shortest, "task.shortest")

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        count = random.integers(self.shortest, length + 1, (rows, 1)) - 2  # symbols of each row
        places = np.arange(length - 2)
        real = places < count
        row = random.integers(SPECIAL, self.vocab, (rows, length - 2))
        one = (~real | (row == row[:, :1])).all(1)  # of a single symbol: no two could differ
        row[one, 0] = SPECIAL + (row[one, 0] - SPECIAL + 1) % self.symbols
        # the first place has a symbol that comes again: then the label is drawn after the bag, and both can be had
        again = (_counts(np.where(real, row, PAD), self.vocab) > 1) & real
        first = _any(random, again)
        second = _any(random, real & (places != first))
        equal = random.integers(0, 2, (rows, 1)) == 1
        same = row == np.take_along_axis(row, first, 1)
        other = _any(random, real & (places != first) & (same == equal))
        taken, left = np.take_along_axis(row, other, 1), np.take_along_axis(row, second, 1)
        np.put_along_axis(row, other, left, 1)
        np.put_along_axis(row, second, taken, 1)
        answer = np.take_along_axis(row, first, 1) == np.take_along_axis(row, second, 1)
        early, late = np.minimum(first, second), np.maximum(first, second)
        ids = np.full((rows, length), PAD)
        np.put_along_axis(ids, places + (places >= early) + (places >= late), np.where(real, row, PAD), 1)
        np.put_along_axis(ids, early, MARK, 1)
        np.put_along_axis(ids, late + 1, MARK, 1)
        valid = np.arange(length) < count + 2
        return of(ids, answer[:, 0], valid=valid, groups={"distance": (late + 1 - early)[:, 0]})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.ids
        symbols = (ids >= SPECIAL).sum(1)
        most = torch.stack([(ids == symbol).sum(1) for symbol in range(SPECIAL, self.vocab)]).amax(0)
        ratio = most / symbols
        places = (ids == MARK).float() * torch.arange(ids.shape[1])
        gap = places.amax(1) - (places.sum(1) - places.amax(1))
        repeated = ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= SPECIAL)).sum(1) / symbols
        rules = {"repeated": repeated, "most": ratio, "near": -gap / symbols}
        return {name: (value > value.median()).long() for name, value in rules.items()}

    def chance(self, seq_len: int) -> float:
        return 0.5


def _any(random: np.random.Generator, of_these: np.ndarray) -> np.ndarray:
    """[B, 1], one of the true columns of each row, all alike."""
    return np.where(of_these, random.random(of_these.shape), -1.0).argmax(1)[:, None]


def _counts(row: np.ndarray, vocab: int) -> np.ndarray:
    """How often each token's id stands in its row."""
    flat = row + vocab * np.arange(len(row))[:, None]
    return np.bincount(flat.ravel(), minlength=vocab * len(row))[flat]
