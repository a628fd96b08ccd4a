"""Multi-query associative recall: key-value pairs first, then, among fillers, each key once, asking for its value.

    ids      k1 v1 k2 v2  f  f k2  f k1  f        f: filler
    targets   .  .  .  .  .  . v2  . v1  .        .: not scored

Source: Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language models", and its published
generator: keys are drawn without repetition from the lower half of the vocabulary (without id 0), values from the upper
half; query slots are every second column after the pairs, drawn without repetition with probability ~ slot^(a-1).

Cost: a batch of B rows takes O(B·vocab) once for the draws, all vectorised.

Deviations: by default a filler is never one of its row's keys. In the published generator fillers come from the whole
vocabulary, so that a key may stand somewhere as a filler, followed by another filler, before it is asked for: the row
then holds a second, wrong answer (`fillers="any"` gives those rules). Training rows are drawn afresh rather than from
a fixed list, unless `examples` fixes their number. Batches are made when they are asked for, each from its own seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from attention_zoo.options import LARGEST, Positive, checked
from attention_zoo.rules import OneOf
from attention_zoo.tasks.task import IGNORED, Batch, Task, digest, generator

FILLERS = ("distinct", "any", "zero")
Size = Annotated[int, Field(le=LARGEST)]
Share = Annotated[float, Field(le=1e12, allow_inf_nan=False)]


class Rows(NamedTuple):
    """`count` rows as arrays, before they become a batch."""

    ids: np.ndarray
    targets: np.ndarray


def draw(
    random: np.random.Generator, *, count: int, length: int, pairs: int, vocab: int, power: float, fillers: str
) -> Rows:
    """Make `count` rows of `length` tokens with `pairs` key-value pairs each; arguments as in `Mqar`."""
    half = vocab // 2
    keys = 1 + _choose(random.random((count, half - 1)), pairs)
    values = half + _choose(random.random((count, vocab - half)), pairs)
    context, slots = 2 * pairs, (length - 2 * pairs) // 2
    # Gumbel-max: the `pairs` largest of log p + noise, in falling order, are draws without repetition one after another
    weight = (power - 1) * np.log(np.arange(1, slots + 1))
    slot = _choose(weight - np.log(-np.log(random.random((count, slots)))), pairs)
    if fillers == "zero":
        ids = np.zeros((count, length), dtype=np.int64)
    elif fillers == "any":
        ids = random.integers(0, vocab, (count, length))
    else:
        # uniform over the vocab - pairs other ids: number those, then step over each key that stands below
        ids = random.integers(0, vocab - pairs, (count, length))
        for key in np.sort(keys, axis=1).T:
            ids += ids >= key[:, None]
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    targets = np.full((count, length), IGNORED, dtype=np.int64)
    column = context + 2 * slot
    np.put_along_axis(ids, column, keys, axis=1)
    np.put_along_axis(targets, column, values, axis=1)
    return Rows(ids, targets)


def _choose(score: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest scores of each row, largest first."""
    found = np.argpartition(-score, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(score, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)


class Mqar(Task):
    """Multi-query associative recall.

    Args:
        vocab: number of ids; half of them keys, half values. Published: 8192.
        pairs: key-value pairs a row; a row of length L has room for L / 4.
        power: exponent a of the gaps' law p ~ slot^(a-1): 0.01 asks soon after the pairs, 1 anywhere alike.
        fillers: what stands in the other columns: "distinct" random ids other than the row's keys, "any" random ids
            as published, "zero" id 0 only.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        train: list of [length, pairs, share]: a mixture of lengths; batches take them at random by share. None trains
            at seq_len alone.
        test: further evaluation sets as [length, pairs].
        test_examples: rows of each evaluation set.
    """

    name = "mqar"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**24)] = 8192,
        pairs: Positive = 4,
        power: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, description="a positive number")] = 0.01,
        fillers: Annotated[str, OneOf(*FILLERS)] = "distinct",
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
        self.vocab, self.pairs, self.power, self.fillers, self.examples = vocab, pairs, power, fillers, examples
        self.mixture = None if train is None else [(int(n), int(p), float(share)) for n, p, share in train]
        self.test = [(int(n), int(p)) for n, p in test]
        self.test_examples = test_examples

    def check(self, seq_len: int) -> None:
        if self.mixture is not None and seq_len != max(n for n, _, _ in self.mixture):
            longest = max(n for n, _, _ in self.mixture)
            raise ValueError(f"seq_len must be the longest length of task.train, {longest}, got {seq_len}")
        for length, pairs in [*self._trained(seq_len)[0], *self.test]:
            if length % 2 or length < 4 * pairs:
                raise ValueError(
                    f"mqar: a row must have an even length of at least 4 tokens per pair, "
                    f"got length {length} for {pairs} pairs"
                )
            if pairs > self.vocab // 2 - 1:
                raise ValueError(f"mqar: pairs must be at most vocab / 2 - 1, got {pairs} for vocab {self.vocab}")

    def _trained(self, seq_len: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Lengths and pairs of training, and how often each is drawn."""
        if self.mixture is None:
            return [(seq_len, self.pairs)], np.ones(1)
        shares = np.array([share for _, _, share in self.mixture])
        return [(n, p) for n, p, _ in self.mixture], shares / shares.sum()

    def describe(self, seq_len: int) -> dict[str, Any]:
        sample = self.batch(1, seq_len, self._trained(seq_len)[0][-1][1], ("digest",))
        return {"digest": digest([sample.ids.numpy().tobytes(), sample.targets.numpy().tobytes()])}

    def batch(self, rows: int, length: int, pairs: int, key: Sequence[int | str]) -> Batch:
        """Rows that depend on `key` and the task's options alone."""
        random = generator("mqar", *key, length, pairs)
        ids, targets = draw(
            random,
            count=rows,
            length=length,
            pairs=pairs,
            vocab=self.vocab,
            power=self.power,
            fillers=self.fillers,
        )
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), None, torch.ones(rows, dtype=torch.bool))

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> MqarBatches:
        self.check(seq_len)
        return MqarBatches(self, batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, MqarSet]:
        self.check(seq_len)
        lengths = self._trained(seq_len)[0]
        main = lengths[-1]
        others = [entry for entry in dict.fromkeys([*lengths, *self.test]) if entry != main]
        sets = {"test": MqarSet(self, batch_size, *main)}
        return sets | {f"length_{n}_pairs_{p}": MqarSet(self, batch_size, n, p) for n, p in others}


class MqarBatches:
    """Training batches; the place in them is a single number."""

    def __init__(self, task: Mqar, batch_size: int, seq_len: int, seed: int):
        self.task, self.batch_size, self.seed, self.step = task, batch_size, seed, 0
        self.lengths, self.shares = task._trained(seq_len)

    def __iter__(self) -> MqarBatches:
        return self

    def __next__(self) -> Batch:
        index = self.step
        if self.task.examples is not None:
            index %= -(-self.task.examples // self.batch_size)
        self.step += 1
        key = ("train", self.seed, index)
        length, pairs = self.lengths[generator("mqar-mixture", *key).choice(len(self.lengths), p=self.shares)]
        return self.task.batch(self.batch_size, length, pairs, key)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


class MqarSet:
    """One evaluation set: the same rows whatever the training seed, and never those of any training seed."""

    def __init__(self, task: Mqar, batch_size: int, length: int, pairs: int):
        self.task, self.batch_size, self.length, self.pairs = task, batch_size, length, pairs

    def __iter__(self) -> Iterator[Batch]:
        whole = self.task.batch(self.task.test_examples, self.length, self.pairs, ("test",))
        for start in range(0, self.task.test_examples, self.batch_size):
            yield whole.rows(slice(start, start + self.batch_size))
