"""Variable tracking: chains of assignments stand in any order, and the value at the end of one is asked for.

    ids      _ : c a _ _ : b Q : f b _ : a P _ ? c      hops 1, chains 2: c is a, a is P; f is b, b is Q
    targets  . . . . . . . . . . . . . . . . . . P      _: filler

Rules: each of `chains` chains gives a value to a variable, and that variable to the next, `hops` times. All variables
of a row differ, and so do its values. The statements of all chains are shuffled, and every arrangement of them among
the fillers is equally likely: one may use a variable that is set further on. At the end, the last variable of `queries`
of the chains is asked for. Following a chain takes hops + 1 look-ups, one after another.

Source: Hsieh et al. 2024, "RULER", §3.2: one chain of 4 hops in noise.

Chance: one over `values`. Trivial rules: the value nearest to the question, and the first of the row, which are right
for one chain in `chains`: .25. Groups: "distance" from the farthest statement of the chain to the question.

Deviations: RULER states a chain in order and asks for all variables that have its value; here a variable is asked for,
whose value is the answer, so that models can be trained from scratch, and fillers are one id instead of sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Natural, Positive, checked
from attention_zoo.tasks.generated import Generated, Setting, of
from attention_zoo.tasks.placement import scattered, shuffled
from attention_zoo.tasks.task import IGNORED, Batch

FILLER, SET, ASK, FIRST = 0, 1, 2, 3
"""Ids; SET begins a statement. From FIRST on stand the variables, then the values."""
STATEMENT = 3


class VariableTracking(Generated):
    """Chains of assignments.

    Args:
        hops: assignments from one variable to another in each chain.
        chains: chains of a row.
        train_hops: other numbers of hops that are trained on, too, in as many batches each: a curriculum.
        queries: chains that are asked for.
        variables: number of ids that are variables.
        values: number of ids that are values.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_hops: hops of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "variable_tracking"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        hops: Natural = 1,
        train_hops: Sequence[Natural] = (),
        chains: Positive = 4,
        queries: Positive = 1,
        variables: Annotated[int, Field(ge=1, le=2**20)] = 64,
        values: Annotated[int, Field(ge=1, le=2**20)] = 64,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_hops: Sequence[Natural] = (),
        test_examples: Positive = 1000,
    ):
        most = max([hops, *train_hops, *test_hops])
        if queries > chains:
            raise ValueError(f"queries must be at most chains, got {queries} of {chains}")
        if variables < chains * (most + 1):
            raise ValueError(f"variables must be at least chains * (hops + 1), {chains * (most + 1)}, got {variables}")
        if values < chains:
            raise ValueError(f"values must be at least chains, {chains}, got {values}")
        self.hops, self.train_hops, self.test_hops = hops, tuple(train_hops), tuple(test_hops)
        self.chains, self.queries, self.variables, self.values = chains, queries, variables, values
        self.vocab = FIRST + variables + values
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        for setting in (*dict(self.trained(seq_len)), *self.tested(seq_len).values()):
            hops = dict(setting.changes).get("hops", self.hops)
            least = STATEMENT * self.chains * (hops + 1) + 2 * self.queries
            self.need(seq_len, least, f"all statements and questions for {hops} hops", [setting.length])

    def trained(self, seq_len: int) -> list[tuple[Setting, float]]:
        return [(Setting(seq_len, (("hops", n),)), 1.0) for n in self.train_hops] + super().trained(seq_len)

    def tested(self, seq_len: int) -> dict[str, Setting]:
        return super().tested(seq_len) | {f"hops_{n}": Setting(seq_len, (("hops", n),)) for n in self.test_hops}

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        links = 1 + changes.get("hops", self.hops)
        statements = self.chains * links
        # [rows, chain, link]: each sets a variable to what stands before it in its chain
        variable = FIRST + shuffled(random, rows, self.variables)[:, :statements].reshape(rows, self.chains, links)
        value = FIRST + self.variables + shuffled(random, rows, self.values)[:, : self.chains, None]
        right = np.concatenate([value, variable[:, :, :-1]], axis=2)
        text = np.stack([np.full_like(variable, SET), variable, right], axis=3).reshape(rows, statements, STATEMENT)

        context = length - 2 * self.queries
        start = scattered(random, rows, statements, STATEMENT, context)
        start = np.take_along_axis(start, shuffled(random, rows, statements), axis=1)
        column = start[:, :, None] + np.arange(STATEMENT)
        ids = np.full((rows, length), FILLER)
        np.put_along_axis(ids, column.reshape(rows, -1), text.reshape(rows, -1), axis=1)

        asked = shuffled(random, rows, self.chains)[:, : self.queries]
        place = context + 1 + 2 * np.arange(self.queries)
        ids[:, place - 1] = ASK
        ids[:, place] = np.take_along_axis(variable[:, :, -1], asked, axis=1)
        farthest = start.reshape(rows, self.chains, links).min(axis=2) + STATEMENT - 1
        targets, distance = np.full((rows, length), IGNORED), np.full((rows, length), -1)
        targets[:, place] = np.take_along_axis(value[:, :, 0], asked, axis=1)
        distance[:, place] = place - np.take_along_axis(farthest, asked, axis=1)
        return of(ids, targets, groups={"distance": distance})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.ids.numpy()
        values = ids >= FIRST + self.variables
        column = {
            "nearest value": ids.shape[1] - 1 - values[:, ::-1].argmax(axis=1),
            "first value": values.argmax(axis=1),
        }
        return {
            name: torch.from_numpy(np.take_along_axis(ids, at[:, None], axis=1)).expand_as(batch.targets)
            for name, at in column.items()
        }

    def chance(self, seq_len: int) -> float:
        return 1 / self.values
