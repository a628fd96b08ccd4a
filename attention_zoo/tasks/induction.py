"""Induction heads: a special token stands once in a row, and again at its end: say what followed it the first time.

    ids       4 2 9 # 7 1 4 9 3 #        #: special
    targets   . . . . . . . . . 7        .: not scored

Rules: all other tokens are uniform over the other ids, what follows the special one among them; that stands anywhere
before the end, uniformly, so that the way back is of any length up to the row's.

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", §4.1.2, after Olsson et al.
2022, "In-context Learning and Induction Heads". One answer a row; trained at one length, tested at others (`test`).

Chance: one over the number of other ids, .067 for 15. Trivial rules: "one id", at chance; "token before", that before
the question, which is the answer itself in one row of L - 2; "commonest id" of the row, .14 at 64 tokens.
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
from attention_zoo.tasks.task import IGNORED, Batch

SPECIAL, FIRST = 0, 1


class Induction(Generated):
    """What followed the special token.

    Args:
        vocab: number of ids, the special one among them.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "induction"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=3, le=2**24)] = 16,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.vocab, self.examples, self.test, self.test_examples = vocab, examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        self.need(seq_len, 3, "the special token twice and what follows it")

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        ids = random.integers(FIRST, self.vocab, (rows, length))
        first = random.integers(0, length - 2, (rows, 1))
        np.put_along_axis(ids, first, SPECIAL, axis=1)
        ids[:, -1] = SPECIAL
        targets, distance = np.full((rows, length), IGNORED), np.full((rows, length), -1)
        targets[:, -1:] = np.take_along_axis(ids, first + 1, axis=1)
        distance[:, -1:] = length - 2 - first
        return of(ids, targets, groups={"distance": distance})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        rules = {"token before": batch.ids[:, -2:-1], "commonest id": commonest(batch.ids, FIRST, self.vocab)}
        return {"one id": torch.full_like(batch.targets, FIRST)} | {
            name: said.expand_as(batch.targets) for name, said in rules.items()
        }

    def chance(self, seq_len: int) -> float:
        return 1 / (self.vocab - FIRST)
