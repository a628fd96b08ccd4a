"""Memorisation: a fixed table from keys to values, the same in every row; the weights must hold it.

    ids       3 ! 0 ! 7 ! 3 !        !: insert
    targets   . f . a . b . f        .: not scored

Rules: each key is uniform, an insert follows it, and at the insert its value is asked. Nothing in a row says it: what
is judged is what a model stores, not what it finds. The table is a random one that depends on the numbers
of keys and values alone, not on the seed; all values are of as many keys as any other, or one key more. So the splits
share the table, and rows may meet, unlike those of other tasks. Where a row starts with a half pair (an odd number of
tokens), that is an insert which is not scored.

Source: Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD), memorization. Chance: one over
the number of values. Trivial rules: "one value", always the table's commonest, at chance where keys are a multiple of
values; "commonest value" of the row, as if all its keys were known but not their places: .13 for 16 keys of 64.

Deviation: MAD's insert is one of the vocabulary's ids; here it stands beside keys and values.
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
from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.task import IGNORED, Batch, generator

Number = Annotated[int, Field(ge=2, le=2**23)]


class Memorisation(Generated):
    """A fixed table of keys and values.

    Args:
        keys, values: numbers of different ids.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "memorisation"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"
    disjoint = False

    @checked
    def __init__(
        self,
        *,
        keys: Number = 128,
        values: Number = 128,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.keys, self.values, self.vocab = keys, values, keys + values + 1
        self.insert = keys + values
        self.table = keys + generator("memorisation-table", keys, values).permutation(np.arange(keys) % values)
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        self.need(seq_len, 2, "a key and an insert")

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        key = random.integers(0, self.keys, (rows, length // 2))
        ids, targets = np.full((rows, length), self.insert), np.full((rows, length), IGNORED)
        ids[:, length % 2 :: 2] = key
        targets[:, length % 2 + 1 :: 2] = self.table[key]
        return of(ids, targets)

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        asked = torch.from_numpy(self.table[batch.ids[:, batch.ids.shape[1] % 2 :: 2].numpy()])
        one = self.keys + int(np.bincount(self.table - self.keys).argmax())
        return {
            "one value": torch.full_like(batch.targets, one),
            "commonest value": commonest(asked, self.keys, self.insert).expand_as(batch.targets),
        }

    def chance(self, seq_len: int) -> float:
        return 1 / self.values
