"""ListOps: the value of a nested expression over digits.

    [MAX 4 [MIN 2 3 ] [SM 8 5 ] ]        the answer is 4; SM adds modulo 10, MED is the median rounded down

Rules: below the root a node is an operator with probability 1/4, else a digit; at the greatest depth all are digits. An
operator, MIN, MAX, MED or SM alike, has 2 ... `arguments` of them, each number as likely. Expressions of `shortest` to
`seq_len` tokens are kept as they come, and padded on the right.

Source: Nangia and Bowman 2018 (the grammar); Tay et al. 2021, Long Range Arena, §2.2 (500 to 2,000 tokens, depth and
arguments up to 10, ten classes; parentheses are not counted and here not written). Deviations: rows are drawn for ever
from (seed, step) and not from one set of 96,000, whose order in the published generator follows that of a hash table;
both limits of the length are included; the root is always an operator, which the limits imply.

Trivial rules, fitted on training rows: the most frequent answer reaches 17 % at 500 to 2,000 tokens (16 % at 100 to
256), the best answer for the first operator **34 to 37 %** (33 %), for the first two tokens 35 % (34 %). Tay et al.
report 16 to 37 % for all models. So what counts is `over_first_token`, the accuracy minus that of the first operator
on the test set of the training length. Chance is the most frequent answer's share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Positive, checked
from attention_zoo.tasks.generated import Generated, GeneratedSet, Setting, of
from attention_zoo.tasks.task import Batch

PAD, ZERO, MIN, MAX, MED, SM, CLOSE = 0, 1, 11, 12, 13, 14, 15
"""Ids; digit d is ZERO + d, and `CLOSE` ends the arguments of an operator."""
OPERATOR = 0.25
AT_ONCE = 256
"""Expressions that are begun together."""
VAIN = 2000
"""Rounds of those without one of a fitting length, after which there is taken to be none."""
FIT, FITTED = ("fit",), 2000
"""Key and number of the training rows that the trivial rules are fitted on."""


class ListOps(Generated):
    """The value of nested lists.

    Args:
        shortest: tokens of the shortest expressions; the longest have `seq_len`.
        depth: greatest number of nested operators plus one.
        arguments: most that an operator has.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets, each from `shortest` on.
        test_examples: rows of each evaluation set.
    """

    name = "listops"
    objective = "classify"
    classes = 10
    vocab = CLOSE + 1
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        shortest: Annotated[int, Field(ge=4, le=2**24)] = 100,
        depth: Annotated[int, Field(ge=2, le=100)] = 10,
        arguments: Annotated[int, Field(ge=2, le=1000)] = 10,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.shortest, self.depth, self.arguments = shortest, depth, arguments
        self.examples, self.test, self.test_examples = examples, test, test_examples
        self.fixed: dict[tuple[str, Setting], Batch] = {}
        self.reached: dict[str, float] = {}

    def check(self, seq_len: int) -> None:
        self.need(seq_len, self.shortest, "task.shortest")

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        found: list[tuple[np.ndarray, np.ndarray]] = []
        missing, vain = rows, 0
        while missing > 0:
            trees = _grown(random, max(AT_ONCE, missing), self.depth, self.arguments, self.shortest, length)
            ids, values = _written(trees, length)
            found.append((ids[:missing], values[:missing]))
            missing, vain = missing - len(ids), 0 if len(ids) else vain + 1
            if vain == VAIN:
                raise ValueError(
                    f"listops: found no expression of {self.shortest} to {length} tokens with "
                    f"task.depth={self.depth} and task.arguments={self.arguments}; give a smaller task.shortest"
                )
        ids, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return of(ids, values, valid=ids != PAD)

    def batch(self, split: str, key: Sequence[int | str], rows: int, setting: Setting) -> Batch:
        if key not in ((), FIT):
            return super().batch(split, key, rows, setting)
        if (split, setting) not in self.fixed:  # an expression in ten fits, an eighth of these is of the split
            self.fixed[split, setting] = super().batch(split, key, rows, setting)
        return self.fixed[split, setting]

    def evaluation_sets(self, batch_size: int, seq_len: int) -> Mapping[str, GeneratedSet]:
        found = super().evaluation_sets(batch_size, seq_len)
        self.reached = self.baselines(seq_len)
        return found

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        seen = self.batch("train", FIT, FITTED, Setting(batch.ids.shape[1]))
        keys = {
            "majority": lambda ids: ids[:, 0] * 0,
            "first_token": lambda ids: ids[:, 0],
            "first_two_tokens": lambda ids: ids[:, 0] * self.vocab + ids[:, 1],
        }
        found = {}
        for name, key in keys.items():
            table = torch.zeros(self.vocab**2, self.classes)
            table.index_put_((key(seen.ids), seen.targets), torch.ones(FITTED), accumulate=True)
            found[name] = table.argmax(1)[key(batch.ids)]
        return found

    def chance(self, seq_len: int) -> float:
        return (self.reached or self.baselines(seq_len))["majority"]

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        found = super().score(loss, accuracy)
        return found | {"over_first_token": accuracy - self.reached["first_token"]} if self.reached else found


class Level(NamedTuple):
    """The nodes of one depth, those with the same parent side by side, in the order in which they are written.

    Fields:
        tree: which expression each is of.
        parent: index in the level above; never falls.
        token: id of the digit or operator.
    """

    tree: np.ndarray
    parent: np.ndarray
    token: np.ndarray


def _grown(
    random: np.random.Generator, count: int, depth: int, arguments: int, shortest: int, longest: int
) -> list[Level]:
    """Those of `count` random expressions that have a fitting number of tokens, numbered afresh."""
    every = np.arange(count)
    levels = [Level(every, every, random.integers(MIN, CLOSE, count))]
    tokens = np.full(count, 2)
    for below in range(1, depth):
        above = levels[-1]
        operators = np.flatnonzero(above.token >= MIN)
        number = random.integers(2, arguments + 1, len(operators))
        tokens += np.bincount(above.tree[operators], number, minlength=count).astype(np.int64)
        grows = tokens[above.tree[operators]] <= longest  # what is too long already need not be finished
        parent = np.repeat(operators[grows], number[grows])
        nested = (random.random(len(parent)) < OPERATOR) & (below < depth - 1)
        token = np.where(nested, random.integers(MIN, CLOSE, len(parent)), random.integers(ZERO, MIN, len(parent)))
        levels.append(Level(above.tree[parent], parent, token))
        tokens += np.bincount(levels[-1].tree[nested], minlength=count)
    fits = (shortest <= tokens) & (tokens <= longest)
    number_of = np.cumsum(fits) - 1
    kept, place_above = [], every
    for level in levels:
        stays = fits[level.tree]
        kept.append(Level(number_of[level.tree[stays]], place_above[level.parent[stays]], level.token[stays]))
        place_above = np.cumsum(stays) - 1
    return kept


def _written(levels: list[Level], length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, length] and values [B] of expressions."""
    values, sizes = [level.token - ZERO for level in levels], [np.ones_like(level.token) for level in levels]
    for depth in range(len(levels) - 1, 0, -1):
        parent = levels[depth].parent
        if len(parent):
            operators, result = _applied(levels[depth - 1].token, parent, values[depth])
            values[depth - 1][operators] = result
            inside = np.bincount(parent, sizes[depth], minlength=len(sizes[depth - 1])).astype(np.int64)
            sizes[depth - 1][operators] = inside[operators] + 2
    rows = len(levels[0].token)
    ids, start = np.full((rows, length), PAD), np.zeros(rows, np.int64)
    for depth, level in enumerate(levels):
        if depth:  # after the operator and the arguments before it
            ends = np.cumsum(sizes[depth])
            before = ends - sizes[depth]
            first = np.searchsorted(level.parent, level.parent)
            start = start[level.parent] + 1 + before - before[first]
        ids[level.tree, start] = level.token
        nested = level.token >= MIN
        ids[level.tree[nested], (start + sizes[depth] - 1)[nested]] = CLOSE
    return ids, values[0]


def _applied(above: np.ndarray, parent: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the level above of the operators, and what each makes of its arguments."""
    operators, first, number = np.unique(parent, return_index=True, return_counts=True)
    ordered = values[np.lexsort((values, parent))]
    middle = (ordered[first + (number - 1) // 2] + ordered[first + number // 2]) // 2
    outcomes = {
        MIN: ordered[first],
        MAX: ordered[first + number - 1],
        MED: middle,
        SM: np.add.reduceat(values, first) % 10,
    }
    return operators, np.select([above[operators] == name for name in outcomes], list(outcomes.values()))
