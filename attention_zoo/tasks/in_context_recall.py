"""In-context recall: keys and their values again and again; a key that was there before asks for its value.

    ids       _ b 5 ~ ~ a 2 b 5 c 2 a 2        ~: noise, _: blank
    targets   . . . . . . . 5 . . . 2 .        .: not scored

    fuzzy     _ _ b a 5 6 c 2 b a 5 6          a key is b a, its value 5 6
              . . . . . . . . . 5 6 .          asked at the key's last token, and at the value's but for its last

Rules: each slot is a pair, whose key is uniform over all keys and whose value is fixed for the row at the key's first
occurrence, or with probability `noise` two noise tokens. The last slot's key is one of the pairs before it, each as
likely, so that every row asks something. Keys and values are of ids of their own; where `fuzzy` is k, each is an
ordered tuple of 1 to k different ids, every size as likely: a key is what stands between a value and the next. What
slots leave of a row is blank and stands before them, `prefix` more at most, so that nothing has a fixed place. Blanks
are ids like others: no mechanism needs to know of padding.

Without `repeat` the keys of all slots but the last differ, and the last alone is asked.

Source: Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD), in-context, noisy and fuzzy
recall; without `repeat` Bulatov et al. 2022, "Recurrent Memory Transformer", §4.1, associative retrieval.

Chance: one over the number of values; a bit more if fuzzy, as no id stands twice in a value. Trivial rules, each over
what stands up to the question: "commonest value" and "last value", that of the pair before. At 8 keys, 8 values, 64
tokens .33 and .26: keys share values by chance. If fuzzy also "last token": what followed the last occurrence of the
token that is read. That is the rule itself for keys and values of one token, and .71 for up to two of 4 ids each, .56
for up to three of 7 and 8.

Deviations: MAD trains on every next token and tests on values of repeated keys; here these alone are scored always.
There fuzzy keys have the most tokens in the test; here they have any number, and the set "longest_keys" has such alone.
There a fuzzy question may lack its evidence; here never. There noise beside fuzzy pairs is as long as they are; here it
is two tokens. In RMT's retrieval a separate token follows the last key, and there the value is said; here at the key.
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
from attention_zoo.tasks.task import IGNORED, Batch

Number = Annotated[int, Field(ge=2, le=2**16)]


class InContextRecall(Generated):
    """Recall of values by keys that come again.

    Args:
        keys, values: numbers of different ids.
        noise: share of the slots that hold noise.
        noise_vocab: number of different noise ids.
        fuzzy: most ids of a key or a value.
        repeat: whether any key may come again, instead of the last alone.
        prefix: most blanks before all else, beyond what slots leave over.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "in_context_recall"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        keys: Number = 8,
        values: Number = 8,
        noise: Probability = 0.0,
        noise_vocab: Positive = 16,
        fuzzy: Annotated[int, Field(ge=1, le=3)] = 1,
        repeat: bool = True,
        prefix: Natural = 0,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        if fuzzy > min(keys, values):
            raise ValueError(f"fuzzy must be at most keys and values, {keys} and {values}, got {fuzzy}")
        if not repeat and (fuzzy > 1 or noise):
            raise ValueError(f"repeat=false takes neither fuzzy nor noise, got fuzzy={fuzzy}, noise={noise}")
        self.keys, self.values, self.noise, self.noise_vocab = keys, values, noise, noise_vocab
        self.fuzzy, self.repeat, self.prefix = fuzzy, repeat, prefix
        # ids: keys, values, noise, blank
        self.first_noise = keys + values
        self.blank = self.first_noise + (noise_vocab if noise else 0)
        self.vocab = self.blank + 1
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        self.need(seq_len, self.prefix + 4 * self.fuzzy, "the prefix and a pair twice")
        pairs = max(seq_len, *self.test, 0) // 2 - 1
        if not self.repeat and pairs > self.keys:
            raise ValueError(
                f"in_context_recall: task.keys must be at least {pairs}, that many differ in the longest rows where "
                f"task.repeat=false, got {self.keys}"
            )

    def tested(self, seq_len: int) -> dict[str, Setting]:
        longest = {"longest_keys": Setting(seq_len, (("longest", True),))} if self.fuzzy > 1 else {}
        return longest | super().tested(seq_len)

    def draw(
        self, random: np.random.Generator, rows: int, length: int, *, longest: bool = False, **changes: Any
    ) -> Batch:
        k, row = self.fuzzy, np.arange(rows)
        extra = random.integers(0, self.prefix + 1, rows)
        slots = length // 2 - 1
        # tuples of ids, and how many of them count
        key = _different(random, (rows, slots + 1), self.keys, k)
        value = self.keys + _different(random, (rows, slots + 1), self.values, k)
        sizes = np.stack([random.integers(k if longest and i == 0 else 1, k + 1, (rows, slots + 1)) for i in (0, 1)])
        if not self.repeat:
            key[:, :slots, 0] = np.argsort(random.random((rows, self.keys)), axis=1)[:, :slots]
        is_noise = random.random((rows, slots + 1)) < self.noise
        least = (length - self.prefix - 2 * k) // (2 * k)  # slots that any row has room for
        is_noise[row, random.integers(0, least, rows)] = False
        place = np.arange(slots + 1)

        def codes() -> np.ndarray:
            """A number for each key, and one of its own below 0 for noise."""
            digits = np.where(np.arange(k) < sizes[0][..., None], key + 1, 0)
            return np.where(is_noise, -1 - place, (digits * (self.keys + 1) ** np.arange(k)).sum(-1))

        first, _ = _earlier(codes())
        value = np.take_along_axis(value, first[..., None], axis=1)
        sizes[1] = np.take_along_axis(sizes[1], first, axis=1)
        sizes[:, is_noise] = 1
        key[is_noise], value[is_noise] = random.integers(
            self.first_noise, self.first_noise + self.noise_vocab, (2, is_noise.sum(), k)
        )
        # as many slots as there is room for, and one that asks for one of them
        count = (sizes.sum(0).cumsum(1) <= (length - extra - 2 * k)[:, None]).sum(1)
        asked = (random.random(is_noise.shape) * (~is_noise & (place < count[:, None]))).argmax(1)
        for each in (key, value, *sizes, is_noise):
            each[row, count] = each[row, asked]
        _, previous = _earlier(np.where(place <= count[:, None], codes(), -1 - place))
        sizes[:, place > count[:, None]] = 0
        start = length + (sizes.sum(0).cumsum(1) - sizes.sum(0)) - sizes.sum((0, 2))[:, None]
        # column `length` takes what is not to be written
        ids = np.full((rows, length + 1), self.blank)
        targets, distance = np.full((rows, length + 1), IGNORED), np.full((rows, length + 1), -1)
        again = previous >= 0
        for i in range(k):
            for said, size, at in ((key, sizes[0], start), (value, sizes[1], start + sizes[0])):
                np.put_along_axis(ids, np.where(i < size, at + i, length), said[..., i], axis=1)
            at = start + sizes[0] + i
            question = np.where(again & (i < sizes[1]), at - 1, length)
            evidence = np.take_along_axis(at, previous.clip(min=0), axis=1)
            np.put_along_axis(targets, question, value[..., i], axis=1)
            np.put_along_axis(distance, question, question - evidence, axis=1)
        return of(ids[:, :length], targets[:, :length], groups={"distance": distance[:, :length]})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids, rows = batch.ids.numpy(), np.arange(len(batch.ids))
        # of what stands up to each column: how often each value does, the last one, and what followed each token last
        counts, followed = np.zeros((2, len(ids), self.vocab), np.int64)
        last = np.zeros(len(ids), np.int64)
        commonest, latest, after = np.zeros((3, *ids.shape), np.int64)
        for column, token in enumerate(ids.T):
            is_value = (token >= self.keys) & (token < self.first_noise)
            counts[rows, token] += is_value
            last = np.where(is_value, token, last)
            if column:
                before = ids[:, column - 1]
                followed[rows, before] = np.where(is_value, token, followed[rows, before])
            commonest[:, column], latest[:, column] = counts.argmax(1), last
            after[:, column] = followed[rows, token]
        rules = {"commonest value": commonest, "last value": latest}
        if self.fuzzy > 1:
            rules["last token"] = after
        return {name: torch.from_numpy(said) for name, said in rules.items()}

    def chance(self, seq_len: int) -> float:
        # an i-th token of a value is there in k - i of k sizes, and is none of the i before
        share = [self.fuzzy - i for i in range(self.fuzzy)]
        return sum(n / (self.values - i) for i, n in enumerate(share)) / sum(share)


def _different(random: np.random.Generator, shape: tuple[int, int], count: int, size: int) -> np.ndarray:
    """[*shape, size], each ordered tuple of `size` different numbers below `count` as likely as any other."""
    found = np.zeros((*shape, size), np.int64)
    for i in range(size):
        new = random.integers(0, count - i, shape)
        for taken in np.moveaxis(np.sort(found[..., :i], axis=-1), -1, 0):
            new += new >= taken
        found[..., i] = new
    return found


def _earlier(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rows, n] of each number in its row where the same stands first, and last before (-1: nowhere)."""
    order = np.argsort(codes, axis=1, kind="stable")
    inside = np.take_along_axis(codes, order, axis=1)
    new = np.ones(codes.shape, bool)
    new[:, 1:] = inside[:, 1:] != inside[:, :-1]
    head = np.maximum.accumulate(np.where(new, np.arange(codes.shape[1]), 0), axis=1)
    first, previous = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, head, axis=1), axis=1)
    before = np.concatenate([order[:, :1], order[:, :-1]], axis=1)
    np.put_along_axis(previous, order, np.where(new, -1, before), axis=1)
    return first, previous
