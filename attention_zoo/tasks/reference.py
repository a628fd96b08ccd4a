"""References: a source of definitions and references far apart; write the values of the references in their order.

    source   . #2 a . . a 7 c 5 . #1 b . b 3 . . .
    target   3 7 end           reference #1 says b, and b is 3; #2 says a, and a is 7

Rules: a record is two tokens. A reference is a number and a name; with `hops` h the name leads over h - 1 records of
two names to one of a name and a value. Names are drawn without repetition, values independently; to `spare` chains
nobody refers. All records stand in random order at random places, fillers between them. The target is the value of
reference #1, of #2, and so on, and an end token. The decoder reads a beginning token and the target before each place.

A share `direct` of the training batches is a first lesson: their references hold a value instead of a name. A decoder
that does not yet look at the right reference gives the encoder no reason to link, and the other way round; without such
batches a small model stays long where it knows neither. No evaluation set has them.

Why a decoder of depth 1: its one cross-attention finds the reference of its place, and can look up nothing more. So the
link from a reference to its value must be in what the encoder hands over. Copying, sorting and span reconstruction are
done by cross-attention whatever the encoder is, and say nothing of it.

Source: our own; associations through names are those of variable tracking (Hsieh et al. 2024, RULER, §3.2) and of
multi-query recall (Arora et al. 2023, §4), here with encoder and decoder. Metric: share of rows written right as a
whole. Chance (1 / values) ^ references. Trivial baselines, 8 values: at most 8 % with 3 references, 2 % with 4:
"nearest" (the value nearest to each reference), "in_order" (the source's first value, its second, ...), "commonest"
(the row's most frequent value, every time).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Natural, Positive, Probability, checked
from attention_zoo.tasks.generated import Generated, Setting, of
from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.placement import scattered, shuffled
from attention_zoo.tasks.task import Batch

BEGIN, END, PAD, FIRST = range(4)
RECORD = 2
"""Tokens of a record."""
Small = Annotated[int, Field(ge=1, le=2**16)]


class Reference(Generated):
    """References and their definitions, for an encoder and a decoder. `seq_len` is the source's.

    Args:
        references: number of references, and of values to be written.
        spare: chains of definitions that nobody refers to.
        hops: steps from a reference's name to its value; 1: the name is defined as the value.
        names, values, fillers: numbers of different ids.
        direct: share of the training batches whose references hold the value itself.
        shortest: tokens of the shortest sources; longer ones up to `seq_len` are as frequent, and all are padded on the
            right. None: every source has `seq_len`.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "reference"
    objective = "seq2seq"
    metric, better = "exact_match", "higher"

    @checked
    def __init__(
        self,
        *,
        references: Small = 4,
        spare: Natural = 2,
        hops: Small = 1,
        names: Small = 16,
        values: Small = 8,
        fillers: Small = 8,
        direct: Probability = 0.25,
        shortest: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.references, self.chains, self.hops, self.shortest = references, references + spare, hops, shortest
        self.direct, self.values, self.test, self.test_examples = direct, values, test, test_examples
        if names < self.chains * hops:
            raise ValueError(f"names must be at least (references + spare) * hops, {self.chains * hops}, got {names}")
        # ids: special, numbers of references, names, values, fillers
        self.first_name = FIRST + references
        self.first_value = self.first_name + names
        self.first_filler = self.first_value + values
        self.vocab = self.first_filler + fillers
        self.records = references + self.chains * hops

    def check(self, seq_len: int) -> None:
        least = RECORD * self.records
        self.need(seq_len, least, f"{self.records} records")
        if self.shortest is not None and self.shortest < least:
            raise ValueError(
                f"reference: task.shortest must be at least {least}, {self.records} records, got {self.shortest}"
            )
        if self.shortest is not None and self.shortest > min([seq_len, *self.test]):
            raise ValueError(
                f"reference: task.shortest must be at most the source's length, {min([seq_len, *self.test])}, "
                f"got {self.shortest}"
            )

    def trained(self, seq_len: int) -> list[tuple[Setting, float]]:
        lesson = (Setting(seq_len, (("direct", True),)), self.direct)
        return [*([lesson] if self.direct else []), (Setting(seq_len), 1 - self.direct)]

    def draw(
        self, random: np.random.Generator, rows: int, length: int, *, direct: bool = False, **changes: Any
    ) -> Batch:
        records, answers = self._records(random, rows, direct)
        sizes = random.integers(self.shortest or length, length + 1, (rows, 1))
        starts = scattered(random, rows, self.records, RECORD, length, sizes)
        order = random.permuted(np.tile(np.arange(self.records), (rows, 1)), axis=1)
        at = np.take_along_axis(starts, order, 1)  # first token of each record
        source = random.integers(self.first_filler, self.vocab, (rows, length))
        for offset in range(RECORD):
            np.put_along_axis(source, at + offset, records[..., offset], 1)
        valid = np.arange(length) < sizes
        source[~valid] = PAD
        begin, end = np.full((rows, 1), BEGIN), np.full((rows, 1), END)
        targets = np.concatenate([answers, end], 1)
        # record c + chains * h is step h of chain c; a chain starts at its reference
        stops = np.concatenate([at[:, : self.references]] + [
            at[:, first : first + self.references] for first in self._firsts()
        ], 1).reshape(rows, self.hops + 1, self.references)  # fmt: skip
        gaps = np.abs(np.diff(stops, axis=1)).max(1) * (not direct)
        return of(
            np.concatenate([begin, targets[:, :-1]], 1),
            targets,
            source=source,
            source_valid=None if self.shortest is None else valid,
            groups={"distance": np.concatenate([gaps, np.full_like(begin, -1)], 1)},
        )

    def _firsts(self) -> range:
        """Of each hop the record of chain 0."""
        return range(self.references, self.records, self.chains)

    def _records(self, random: np.random.Generator, rows: int, direct: bool) -> tuple[np.ndarray, np.ndarray]:
        """[B, records, 2]: the references, then hop by hop a record of each chain; [B, references]: what is asked."""
        known = self.first_value - self.first_name
        names = shuffled(random, rows, known)[:, : self.chains * self.hops] + self.first_name
        values = random.integers(self.first_value, self.first_filler, (rows, self.chains))
        numbers = np.tile(np.arange(FIRST, self.first_name), (rows, 1))
        named = names[:, : self.references]
        if direct:
            named = random.integers(self.first_value, self.first_filler, named.shape)
        left = np.concatenate([numbers, names], 1)
        right = np.concatenate([named, names[:, self.chains :], values], 1)
        return np.stack([left, right], 2), named if direct else values[:, : self.references]

    def baselines(self, seq_len: int) -> dict[str, float]:
        whole = self.batch("test", (), self.test_examples, self.trained(seq_len)[-1][0])
        return {
            name: float((guess == whole.targets).all(1).double().mean()) for name, guess in self._guessed(whole).items()
        }

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.source is not None
        source, places = batch.source, torch.arange(batch.source.shape[1])
        is_value = (source >= self.first_value) & (source < self.first_filler)
        numbers = torch.arange(FIRST, self.first_name)
        where = (source[:, None] == numbers[:, None]).long().argmax(2)  # [B, references]
        far = (where[..., None] - places).abs().masked_fill(~is_value[:, None], source.shape[1])
        found = is_value.long().argsort(dim=1, descending=True, stable=True)[:, : self.references]
        most = commonest(source, self.first_value, self.first_filler).expand_as(where)
        rules = {"nearest": source.gather(1, far.argmin(2)), "in_order": source.gather(1, found)}
        return {
            name: torch.cat([guess, torch.full_like(guess[:, :1], END)], 1)
            for name, guess in {**rules, "commonest": most}.items()
        }

    def chance(self, seq_len: int) -> float:
        return float(self.values) ** -self.references
