"""Multi-query associative recall: key-value pairs, then, among fillers, each key once, asking for its value.

    ids      f  k1 v1 k2 v2  f  f k2  f k1  f        f: filler; prefix 1
    targets  .  .  .  .  .   .  . v2  . v1  .        .: not scored

    compositional   a x v1  b x v2  a y v3  b y v4  f  b  x  f          updates   k1 v1 k2 v2 k1 v3  f k1  f k2
                    . . .   . . .   . . .   . . .   .  . v2  .                    .  .  .  .  .  .   . v3  . v2

Rules: keys are drawn without repetition from the lower part of the vocabulary (without id 0), values from the upper.
After the pairs come slots of one key and a filler; `questions` of the keys stand in slots drawn without repetition with
probability ~ slot^(a-1). Before the pairs stand 0 to `prefix` fillers, each number as likely, so that no pair is always
at one place; `noise` puts fillers between pairs, in every arrangement alike. With `updates` that many keys are paired
a second time, after all others, and the last value is asked for. `compositional` keys are of two tokens, all those of a
√pairs × √pairs grid: neither half tells the value.

Source: Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language models", and its published
generators of this, the forgetting and the compositional form; noise between pairs: Poli et al. 2024, "Mechanistic
Design and Scaling of Hybrid Architectures" (MAD).

Chance: one over the number of values. Trivial rules: the last of the values that are asked for, 1/pairs where all are;
the row's commonest value (a filler or a pair's: at most a few per cent); with `updates`, a key's first value, which is
right for what was not updated; with `compositional`, the first pair with the same first half, 1/√pairs. Groups:
"distance", tokens from the value to the question; "key", which pair of the row it is, from 0, updates counted on.

Cost: a batch of B rows takes O(B·vocab) once for the draws, all vectorised.

Deviations, each with the option that gives the published rule: a filler is never a key of its row. The published
generators draw fillers from the whole vocabulary, so that a key may stand somewhere as a filler, followed by another
filler, before it is asked for: the row then holds a second, wrong answer (`fillers="any"`). Pairs do not begin in the
first column (`prefix=0`). Training rows are drawn afresh rather than from a fixed list (`examples`). All values of a
row differ, updates too: the published generator compares an update with the value of another key, and may thus repeat
the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import LARGEST, Natural, Positive, Probability, checked
from attention_zoo.rules import OneOf
from attention_zoo.tasks.generated import Generated, Setting, of
from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.placement import scattered, shuffled
from attention_zoo.tasks.task import IGNORED, Batch

FILLERS = ("distinct", "any", "zero")
Size = Annotated[int, Field(le=LARGEST)]
Share = Annotated[float, Field(le=1e12, allow_inf_nan=False)]


class Mqar(Generated):
    """Multi-query associative recall.

    Args:
        vocab: number of ids; half of them keys, half values; compositional: two thirds keys. Published: 8192.
        pairs: key-value pairs a row; compositional: a square number.
        questions: how many of the keys are asked for; None: all.
        values: number of ids that are values; None: half of the vocabulary, or a third.
        prefix: most fillers before the pairs; None: a quarter of the row, or what the pairs leave. Published: 0.
        power: exponent a of the gaps' law p ~ slot^(a-1): 0.01 asks soon after the pairs, 1 anywhere alike.
        fillers: what stands in the other columns: "distinct" random ids other than the row's keys, "any" random ids
            as published, "zero" id 0 only.
        noise: share of fillers from the first pair to the last.
        updates: how many keys get a second value.
        compositional: whether keys are of two tokens.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        train: list of [length, pairs, share]: a mixture of lengths; batches take them at random by share. None trains
            at seq_len alone.
        test: further evaluation sets as [length, pairs].
        test_examples: rows of each evaluation set.
    """

    name = "mqar"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**24)] = 8192,
        pairs: Positive = 4,
        questions: Positive | None = None,
        values: Positive | None = None,
        prefix: Natural | None = None,
        power: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, description="a positive number")] = 0.01,
        fillers: Annotated[str, OneOf(*FILLERS)] = "distinct",
        noise: Probability = 0.0,
        updates: Natural = 0,
        compositional: bool = False,
        examples: Positive | None = None,
        train: Sequence[Sequence[Size | Share]] | None = None,
        test: Sequence[Sequence[Size]] = (),
        test_examples: Positive = 1000,
    ):
        for name, entries, size in (("train", train or (), 3), ("test", test, 2)):
            for entry in entries:
                if len(entry) != size or min(entry) <= 0 or any(type(number) is not int for number in entry[:2]):
                    parts = "[length, pairs, share]" if size == 3 else "[length, pairs]"
                    raise ValueError(f"{name} must list {parts}, all positive, got {list(entry)}")
        if values is not None and values > vocab - 2:
            raise ValueError(f"values must leave ids for keys, at most vocab - 2, got {values} of {vocab}")
        self.vocab, self.pairs, self.questions, self.prefix = vocab, pairs, questions, prefix
        self.power, self.fillers, self.noise, self.updates = power, fillers, noise, updates
        self.compositional, self.key_tokens = compositional, 2 if compositional else 1
        if values is None:
            values = vocab - 2 * (vocab // 3) if compositional else vocab - vocab // 2
        self.values, self.lowest_value = values, vocab - values
        self.mixture = None if train is None else [(int(n), int(p), float(share)) for n, p, share in train]
        self.test = [(int(n), int(p)) for n, p in test]
        self.examples, self.test_examples = examples, test_examples

    def check(self, seq_len: int) -> None:
        if self.mixture is not None and seq_len != (longest := max(n for n, _, _ in self.mixture)):
            raise ValueError(f"seq_len must be the longest length of task.train, {longest}, got {seq_len}")
        trained = [setting for setting, _ in self.trained(seq_len)]
        for setting in [*trained, *self.tested(seq_len).values()]:
            length, pairs = setting.length, dict(setting.changes)["pairs"]
            if self.compositional and isqrt(pairs) ** 2 != pairs:
                raise ValueError(f"mqar: pairs must be a square number where keys are compositional, got {pairs}")
            for name, count in (("questions", self.questions or 0), ("updates", self.updates)):
                if count > pairs:
                    raise ValueError(f"mqar: {name} must be at most pairs, got {count} of {pairs}")
            least = self._context(pairs) + self._asked(pairs) * self._slot
            others = "task.train" if setting in trained else "task.test"
            self.need(seq_len, least, f"{pairs} pairs and their questions", [length], others)
            side = isqrt(pairs) if self.compositional else pairs
            if side > (most := self._ids_of_a_half - 1):
                raise ValueError(
                    f"mqar: {'the root of ' * self.compositional}pairs must be at most {most} where the vocabulary has "
                    f"that many keys, got {side} for vocab {self.vocab}"
                )
            if pairs + self.updates > self.values:
                raise ValueError(
                    f"mqar: pairs and updates must be at most the number of values, got {pairs + self.updates} of "
                    f"{self.values} for vocab {self.vocab}"
                )

    @property
    def _slot(self) -> int:
        """Tokens of a pair, and of a question with the filler behind it."""
        return self.key_tokens + 1

    @property
    def _ids_of_a_half(self) -> int:
        """Ids below the values for each token of a key; the first loses id 0."""
        return self.lowest_value // self.key_tokens

    def _asked(self, pairs: int) -> int:
        return pairs if self.questions is None else self.questions

    def _context(self, pairs: int) -> int:
        """Tokens from the first pair to the last, with noise."""
        tokens = (pairs + self.updates) * self._slot
        return tokens + round(tokens * self.noise / (1 - self.noise))

    def trained(self, seq_len: int) -> list[tuple[Setting, float]]:
        if self.mixture is None:
            return [(_setting(seq_len, self.pairs), 1.0)]
        return [(_setting(length, pairs), share) for length, pairs, share in self.mixture]

    def tested(self, seq_len: int) -> dict[str, Setting]:
        trained = [setting for setting, _ in self.trained(seq_len)]
        others = [
            setting for setting in (*trained, *(_setting(*entry) for entry in self.test)) if setting != trained[-1]
        ]
        return {f"length_{setting.length}_pairs_{setting.changes[0][1]}": setting for setting in others}

    def draw(
        self, random: np.random.Generator, rows: int, length: int, *, pairs: int | None = None, **changes: Any
    ) -> Batch:
        pairs = self.pairs if pairs is None else pairs
        records, width, asked, context = pairs + self.updates, self._slot, self._asked(pairs), self._context(pairs)
        keys = self._keys(random, rows, pairs)
        values = self.lowest_value + _choose(random.random((rows, self.values)), records)
        last = np.arange(pairs)[None].repeat(rows, axis=0)  # the pair that tells each key's value
        if self.updates:
            updated = _choose(random.random((rows, pairs)), self.updates)
            keys = np.concatenate([keys, np.take_along_axis(keys, updated[:, :, None], axis=1)], axis=1)
            np.put_along_axis(last, updated, pairs + np.arange(self.updates), axis=1)

        most = length // 4 if self.prefix is None else self.prefix
        most = min(most, length - context - asked * width)
        first = random.integers(0, most + 1, (rows, 1)) if most else np.zeros((rows, 1), np.int64)
        start = first + (
            width * np.arange(records) if not self.noise else scattered(random, rows, records, width, context)
        )
        # Gumbel-max: the largest of log p + noise, in falling order, are draws without repetition one after another
        slots = np.arange((length - context) // width)
        score = (self.power - 1) * np.log(slots + 1) - np.log(-np.log(random.random((rows, len(slots)))))
        score[slots >= (length - context - first) // width] = -np.inf
        question = first + context + width * _choose(score, asked)
        which = np.arange(pairs) if asked == pairs else _choose(random.random((rows, pairs)), asked)
        last = np.take_along_axis(last, np.broadcast_to(which, (rows, asked)), axis=1)

        ids = self._filled(random, rows, length, keys)
        for column in range(self.key_tokens):
            np.put_along_axis(ids, start + column, keys[:, :, column], axis=1)
            asks = np.take_along_axis(keys[:, :, column], last, axis=1)
            np.put_along_axis(ids, question + column, asks, axis=1)
        np.put_along_axis(ids, start + self.key_tokens, values, axis=1)
        question += self.key_tokens - 1
        found = {}
        for name, value, empty in (
            ("target", np.take_along_axis(values, last, axis=1), IGNORED),
            ("distance", question - self.key_tokens - np.take_along_axis(start, last, axis=1), -1),
            ("key", last, -1),
        ):
            found[name] = np.full((rows, length), empty)
            np.put_along_axis(found[name], question, value, axis=1)
        return of(ids, found.pop("target"), groups=found)

    def _keys(self, random: np.random.Generator, rows: int, pairs: int) -> np.ndarray:
        """[rows, pairs, tokens of a key]"""
        half = self._ids_of_a_half
        if not self.compositional:
            return 1 + _choose(random.random((rows, half - 1)), pairs)[:, :, None]
        side = isqrt(pairs)
        first = 1 + _choose(random.random((rows, half - 1)), side)
        second = half + _choose(random.random((rows, half)), side)
        cell = shuffled(random, rows, pairs)
        halves = np.take_along_axis(first, cell // side, axis=1), np.take_along_axis(second, cell % side, axis=1)
        return np.stack(halves, axis=2)

    def _filled(self, random: np.random.Generator, rows: int, length: int, keys: np.ndarray) -> np.ndarray:
        """Rows of fillers."""
        if self.fillers == "zero":
            return np.zeros((rows, length), dtype=np.int64)
        if self.fillers == "any":
            return random.integers(0, self.vocab, (rows, length))
        # uniform over the ids that are no keys: number those, then step over each key that stands below
        taken = np.sort(keys.reshape(rows, -1), axis=1)
        again = np.diff(taken, axis=1, prepend=-1) == 0
        taken = np.sort(np.where(again, self.vocab, taken), axis=1)  # each once; what is left over stands above all
        free = self.vocab - (~again).sum(axis=1, keepdims=True)
        ids = random.integers(0, np.broadcast_to(free, (rows, length)))
        for key in taken.T:
            ids += ids >= key[:, None]
        return ids

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids, distance = batch.ids.numpy(), batch.groups["distance"].numpy()
        rows, length = ids.shape
        question = np.nonzero(distance >= 0)[1].reshape(rows, -1)
        evidence = question - np.take_along_axis(distance, question, axis=1)
        most = commonest(batch.ids, self.lowest_value, self.vocab).numpy()
        found = {"commonest value": np.broadcast_to(most, question.shape)}
        if self.noise:
            column = np.sort(evidence, axis=1)  # of all values that are asked for, not whose each is
        else:
            index = np.take_along_axis(batch.groups["key"].numpy(), question, axis=1)
            pairs = question.shape[1] if self.questions is None else self.trained(length)[-1][0].changes[0][1]
            column = (evidence - self._slot * index)[:, :1] + self._slot * np.arange(pairs + self.updates)
        value = np.take_along_axis(ids, column, axis=1)
        blind = bool(self.noise and self.questions)  # then the pairs that are not asked for cannot be told from noise
        if not blind:
            found["last value"] = np.broadcast_to(value[:, -1:], question.shape)
        key = [np.take_along_axis(ids, question - back, axis=1) for back in reversed(range(self.key_tokens))]
        if self.compositional and not blind:
            same = np.take_along_axis(ids, column - 2, axis=1)[:, None, :] == key[0][:, :, None]
            found["first half"] = np.take_along_axis(value, same.argmax(axis=2), axis=1)
        if self.updates:
            seen = np.ones((*question.shape, length - self.key_tokens), bool)
            for back, token in enumerate(key):
                seen &= ids[:, None, back : length - self.key_tokens + back] == token[:, :, None]
            found["first value"] = np.take_along_axis(ids, seen.argmax(axis=2) + self.key_tokens, axis=1)
        return {name: _placed(question, answer, length) for name, answer in found.items()}

    def chance(self, seq_len: int) -> float:
        return 1 / self.values


def _setting(length: int, pairs: int) -> Setting:
    return Setting(length, (("pairs", pairs),))


def _placed(column: np.ndarray, answer: np.ndarray, length: int) -> Tensor:
    """Rows that say each answer in its column."""
    found = np.zeros((len(column), length), np.int64)
    np.put_along_axis(found, column, answer, axis=1)
    return torch.from_numpy(found)


def _choose(score: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest scores of each row, largest first."""
    found = np.argpartition(-score, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(score, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)
