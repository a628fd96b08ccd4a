"""Needles in real text: records of a key and its value stand somewhere in it, and keys are asked for at its end.

    ids      t t t § k K v V t t § k L w W t t t t ? k K v V       §: a record begins, ?: a question does
    targets  . . . . . . . . . . . . . . . . . . . . . v V .       t: text

Rules: a token is a byte, and the text is real, from a random place of its source. Records are `key_bytes` of a key and
`value_bytes` of its value, drawn from `alphabet` bytes; § and ? are bytes that no text holds (UTF-8 ends at 0xF4).
All keys of a row differ from one another in one or two bytes, so that a part of a key finds nothing. Every arrangement
of records and bytes of text is equally likely: depth is uniform. `keys`, `values` and `queries` are RULER's multi-key,
multi-value and multi-query: `values` records have the same key, which asks for all of them, in the order they stand.

Source: Kamradt 2023, "Needle in a haystack"; Hsieh et al. 2024, "RULER", §3.1, and its generator for the options.

Chance: one over `alphabet`. Trivial rules, with 4 keys of 1 value: the value seen last and the one seen first (each
one in four, and chance beside), the commonest byte of all values (the same: it is that of one of them). Where several
answers are asked for, each stands in the row behind its question, so that "value not yet said" knows ever more without
a look at the keys: the first of the values that no answer was yet is right for .25, .33, .50 and all of 4 answers, .55
as conf/task/needle.yaml has it. Groups: "depth", 0...9, the tenth of the places for a record in which that of the value
stands; "distance" from each byte of it to its question.

Deviations: random bytes for words and numbers, since models are trained from scratch; RULER shuffles its records with
one fixed seed for every row, so that they stand at the same places. The text is that of Python's standard library, all
of which may stand behind the rows of any split: it is no evidence, and rows are kept apart by what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Positive, Text, checked
from attention_zoo.tasks.corpus import existing, join_files, read_files, standard_library
from attention_zoo.tasks.generated import Generated, of
from attention_zoo.tasks.placement import scattered, shuffled
from attention_zoo.tasks.task import IGNORED, Batch, digest

RECORD, QUESTION = 0xF5, 0xF6
LOWEST = 0x80
"""Keys and values begin here, where there is room for all of the alphabet: bytes that ASCII text does not hold."""


class Needle(Generated):
    """Records in text.

    Args:
        keys: different keys of a row.
        values: records of each key.
        queries: keys that are asked for.
        key_bytes, value_bytes: of a record.
        alphabet: number of bytes that keys and values are drawn from: up to 117 of them are none that ASCII text has,
            so that each says that it is of a record; with letters of the text models learn several times as slowly.
        path: a file or folder of your own text; None reads the source of Python's standard library.
        suffix: ending of the files to take from a folder; None takes all.
        max_bytes: about how much text to read.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "needle"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"
    vocab = 256

    @checked
    def __init__(
        self,
        *,
        keys: Positive = 4,
        values: Positive = 1,
        queries: Positive = 1,
        key_bytes: Positive = 2,
        value_bytes: Positive = 2,
        alphabet: Annotated[int, Field(ge=2, le=RECORD)] = 64,
        path: Text | None = None,
        suffix: Text | None = None,
        max_bytes: Positive = 1_000_000,
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        if queries > keys:
            raise ValueError(f"queries must be at most keys, got {queries} of {keys}")
        if keys > 1 + key_bytes * (alphabet - 1):
            raise ValueError(
                f"keys must be at most 1 + key_bytes * (alphabet - 1), since each differs from one in one byte, "
                f"got {keys} for {key_bytes} of {alphabet}"
            )
        self.keys, self.values, self.queries = keys, values, queries
        self.key_bytes, self.value_bytes, self.alphabet = key_bytes, value_bytes, alphabet
        self.path, self.suffix, self.max_bytes = path, suffix, max_bytes
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    @property
    def record(self) -> int:
        """Bytes of a record with its mark."""
        return 1 + self.key_bytes + self.value_bytes

    @property
    def asked(self) -> int:
        """Bytes of all questions with their answers."""
        return self.queries * (1 + self.key_bytes + self.values * self.value_bytes)

    @cached_property
    def text(self) -> np.ndarray:
        """All of the text; without bytes that stand for records."""
        if self.path is None:
            data = standard_library(self.max_bytes)
        else:
            data = join_files(read_files(existing(self.path), self.suffix, self.max_bytes)).data
        return data[data < RECORD]

    def check(self, seq_len: int) -> None:
        least = self.keys * self.values * self.record + self.asked
        self.need(seq_len, least, "all records and questions")
        if len(self.text) < (longest := max(seq_len, *self.test, 0)):
            raise ValueError(
                f"needle: task.path must hold at least {longest} bytes of text, a row, got {len(self.text)} from "
                f"{self.path or 'the standard library'}"
            )

    def describe(self, seq_len: int) -> dict[str, Any]:
        rows = super().describe(seq_len)["digest"]
        return {"text_bytes": len(self.text), "digest": digest([rows, self.text.tobytes()])}

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        records, size = self.keys * self.values, self.value_bytes
        key = self._keys(random, rows)
        value = self._lowest + random.integers(0, self.alphabet, (rows, records, size))
        of_record = shuffled(random, rows, records) // self.values  # which key each record has, as they stand
        shown = np.take_along_axis(key, of_record[:, :, None], axis=1)
        asked_key = shuffled(random, rows, self.keys)[:, : self.queries]
        # the records of each key that is asked for, in the order they stand
        standing = np.argsort(of_record, axis=1, kind="stable").reshape(rows, self.keys, self.values)
        asked = np.take_along_axis(standing, asked_key[:, :, None], axis=1).reshape(rows, -1)

        context = length - self.asked
        start = scattered(random, rows, records, self.record, context)
        column = start[:, :, None] + np.arange(self.record)
        mark = np.full((rows, records, 1), RECORD)
        ids = self._text(random, rows, context)
        flat = column.reshape(rows, -1)
        np.put_along_axis(ids, flat, np.concatenate([mark, shown, value], axis=2).reshape(rows, -1), axis=1)

        answer = np.take_along_axis(value, asked[:, :, None], axis=1).reshape(rows, self.queries, -1)
        question = [
            np.full((rows, self.queries, 1), QUESTION),
            np.take_along_axis(key, asked_key[:, :, None], axis=1),
            answer,
        ]
        ids = np.concatenate([ids, np.concatenate(question, axis=2).reshape(rows, -1)], axis=1)
        place = context + np.arange(self.asked).reshape(self.queries, -1)[:, self.key_bytes : -1].ravel()
        evidence = np.take_along_axis(column[:, :, -size:], asked[:, :, None], axis=1).reshape(rows, -1)
        targets, distance, depth = (np.full((rows, length), fill) for fill in (IGNORED, -1, -1))
        targets[:, place] = answer.reshape(rows, -1)
        distance[:, place] = place - evidence
        first = np.take_along_axis(start, asked, axis=1).repeat(size, axis=1)
        depth[:, place] = first * 10 // (context - self.record + 1)
        return of(ids, targets, groups={"distance": distance, "depth": depth})

    @property
    def _lowest(self) -> int:
        return max(0, min(LOWEST, RECORD - self.alphabet))

    def _keys(self, random: np.random.Generator, rows: int) -> np.ndarray:
        """[rows, keys, key_bytes]: one key, and others that differ from it in one byte each."""
        key = random.integers(0, self.alphabet, (rows, 1, self.key_bytes)).repeat(self.keys, axis=1)
        change = shuffled(random, rows, self.key_bytes * (self.alphabet - 1))[:, : self.keys - 1]
        byte, by = change // (self.alphabet - 1), 1 + change % (self.alphabet - 1)
        shift = np.where(byte[:, :, None] == np.arange(self.key_bytes), by[:, :, None], 0)
        key[:, 1:] += shift
        return self._lowest + key % self.alphabet

    def _text(self, random: np.random.Generator, rows: int, length: int) -> np.ndarray:
        start = random.integers(0, len(self.text) - length + 1, (rows, 1))
        return self.text[start + np.arange(length)].astype(np.int64)

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.ids.numpy()
        rows, length = ids.shape
        start = np.nonzero(ids == RECORD)[1].reshape(rows, -1, 1)
        column = start + 1 + self.key_bytes + np.arange(self.value_bytes)
        value = np.take_along_axis(ids, column.reshape(rows, -1), axis=1).reshape(rows, -1, self.value_bytes)
        same = (value[:, :, None, :] == value[:, None, :, :]).sum(axis=2)
        commonest = np.take_along_axis(value, same.argmax(axis=1)[:, None, :], axis=1)[:, 0]
        # which byte of a value each column answers; columns that answer nothing say anything
        byte = np.arange(length) - (length - self.asked)
        byte = (byte % (self.asked // self.queries) - self.key_bytes) % self.value_bytes
        found = {"last value": value[:, -1], "first value": value[:, 0], "commonest byte": commonest}
        guesses = {name: torch.from_numpy(guess[:, byte]) for name, guess in found.items()}
        if self.queries * self.values > 1:
            guesses["value not yet said"] = torch.from_numpy(self._left(ids, value))
        return guesses

    def _left(self, ids: np.ndarray, value: np.ndarray) -> np.ndarray:
        """[rows, length], at each answer the first value that no answer before it was, whatever the keys."""
        every, found = np.arange(len(ids)), np.zeros_like(ids)
        left = np.ones(value.shape[:2], bool)
        for query in range(self.queries):
            first = ids.shape[1] - self.asked + query * (self.asked // self.queries) + 1 + self.key_bytes
            for start in range(first, first + self.values * self.value_bytes, self.value_bytes):
                columns = slice(start, start + self.value_bytes)
                found[:, start - 1 : start - 1 + self.value_bytes] = value[every, left.argmax(axis=1)]
                left[every, (left & (value == ids[:, None, columns]).all(axis=2)).argmax(axis=1)] = False
        return found

    def chance(self, seq_len: int) -> float:
        return 1 / self.alphabet
