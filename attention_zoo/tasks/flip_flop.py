"""Flip-flop language: one bit is written, ignored over, and read back.

    ids      i 1  w 0  i 1  i 1  r 0  i 0  w 1  r 1  r 1      w: write, i: ignore, r: read; each is followed by a bit
    targets  . .  . .  . .  . .  0 .  . .  . .  1 .  . .      .: not scored

Rules: a row is instructions, each followed by a bit. After "r" it is the bit of the last "w"; after the others it is
random. The first write stands after a random number of ignored bits (`prefix`), the last instruction reads, and those
between are "i" with `p_ignore`, else a write or a read alike. Scored is the first read after each write: every later
one restates what was just read, so that a short window would relay it. Any length; of an odd one the last instruction's
bit is asked for and not shown.

Source: Liu et al. 2023, "Exposing Attention Glitches with Flip-Flop Language Modeling", §3: p_ignore .8 in training,
.98 for rare long gaps and .1 in the two further test sets. The evaluation set "long_gap" has nothing but its longest
gaps: one write, within the first `long_gap` of the row, and one read, the last instruction.

Chance: one half. Trivial rules at 128 tokens and p_ignore .98: the last bit seen .55 (right where the read follows its
write, or by luck), the row's commonest bit so far .57, the bit of the row's first write .88: most rows write once, so
look at "long_gap" and at the groups by distance, too. Groups: "distance" from the written bit to the question.

Deviations: as published every first instruction writes (`prefix: false`) and every read is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_zoo.options import Positive, Probability, Share, checked
from attention_zoo.tasks.generated import Generated, Setting, of
from attention_zoo.tasks.task import IGNORED, Batch

WRITE, READ, IGNORE = 2, 3, 4
"""Ids of the instructions; those of the bits are 0 and 1."""


class FlipFlop(Generated):
    """Flip-flop language modelling.

    Args:
        p_ignore: how likely an instruction is to be ignored.
        prefix: whether ignored bits stand before the first write, as many as fall out; else it is always the first.
        test_p_ignore: `p_ignore` of further evaluation sets.
        long_gap: share of the row within which the only write of the evaluation set "long_gap" stands; 0: no such set.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets; each also with its long gaps.
        test_examples: rows of each evaluation set.
    """

    name = "flip_flop"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"
    vocab = 5

    @checked
    def __init__(
        self,
        *,
        p_ignore: Probability = 0.98,
        prefix: bool = True,
        test_p_ignore: Sequence[Probability] = (),
        long_gap: Share = 0.05,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.p_ignore, self.prefix, self.test_p_ignore, self.long_gap = p_ignore, prefix, test_p_ignore, long_gap
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        self.need(seq_len, 7, "a write, a read and what stands between them")

    def tested(self, seq_len: int) -> dict[str, Setting]:
        sets = {f"p_ignore_{p}": Setting(seq_len, (("p_ignore", p),)) for p in self.test_p_ignore}
        sets |= super().tested(seq_len)
        if self.long_gap:
            sets["long_gap"] = Setting(seq_len, (("long", True),))
            sets |= {f"long_gap_{length}": Setting(length, (("long", True),)) for length in self.test}
        return sets

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        long = changes.get("long", False)
        ignored = 1.0 if long else changes.get("p_ignore", self.p_ignore)
        count = (length + 1) // 2
        place = np.arange(count)
        latest = min(max(1, int(self.long_gap * count)), count - 1) if long else count - 1 if self.prefix else 1
        first = random.integers(0, latest, (rows, 1))
        draws = random.random((rows, count))
        kind = np.where(draws < ignored, IGNORE, np.where(draws < (1 + ignored) / 2, WRITE, READ))
        kind[place < first] = IGNORE
        np.put_along_axis(kind, first, WRITE, axis=1)
        kind[:, -1] = READ

        bits = random.integers(0, 2, (rows, count))
        written = np.maximum.accumulate(np.where(kind == WRITE, place, 0), axis=1)  # the last write until here
        read = kind == READ
        bits[read] = np.take_along_axis(bits, written, axis=1)[read]
        touched = np.maximum.accumulate(np.where(kind != IGNORE, place, 0), axis=1)  # the last write or read until here
        before = np.concatenate([np.zeros((rows, 1), np.int64), touched[:, :-1]], axis=1)
        asked = read & (before == written)

        ids = np.stack([kind, bits], axis=2).reshape(rows, -1)[:, :length]
        targets, distance = np.full((rows, length), IGNORED), np.full((rows, length), -1)
        targets[:, ::2] = np.where(asked, bits, IGNORED)
        distance[:, ::2] = np.where(asked, 2 * (place - written) - 1, -1)
        return of(ids, targets, groups={"distance": distance})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.ids.numpy()
        column = np.arange(ids.shape[1])
        bits = ids < 2
        last = np.maximum.accumulate(np.where(bits, column, 0), axis=1)
        balance = np.cumsum(np.where(bits, 2 * ids - 1, 0), axis=1)
        first = np.take_along_axis(ids, (ids == WRITE).argmax(axis=1)[:, None] + 1, axis=1)
        found: dict[str, Any] = {
            "last bit": np.take_along_axis(ids, last, axis=1),
            "commonest bit": (balance > 0).astype(np.int64),
            "first write": np.broadcast_to(first, ids.shape),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(guess)) for name, guess in found.items()}

    def chance(self, seq_len: int) -> float:
        return 0.5
