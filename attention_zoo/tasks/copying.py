"""Copy a word: it is shown once, and after a gap it is asked for, token by token.

    ids      _  #  c  a  b  _  _  #  c  a  b  _        #: marker, _: blank; prefix 1, gap 2
    targets  .  .  .  .  .  .  .  c  a  b  .  .        .: not scored

    selective  _  c  _  _  a  b  _  #  _  _  _         feed: blank
               .  .  .  .  .  .  .  .  c  a  b

Rules: the word is of `tokens` symbols, each uniform. `prefix` and `gap` are the most blanks before it and after it;
each row draws how many from 0 upwards, uniformly, so that neither the word nor the way back to it stands still. What is
left of the row stands at its end. Where `selective`, the word's tokens stand among blanks in columns drawn uniformly,
in order, and prefix and gap are what falls out of that.

Source: Kitaev et al. 2020, "Reformer", §5 "0w0w" (no prefix, no gap); Bulatov et al. 2022, "Recurrent Memory
Transformer", §4.1 (times 2, or reverse; no marker at the start); Gu & Dao 2023, "Mamba", §4.1.1, and Poli et al. 2024,
"Mechanistic Design and Scaling of Hybrid Architectures" (MAD), selective copying.

Chance: one over the number of symbols. Trivial rules: one symbol always, which is at chance, and the row's commonest
symbol, which reaches the share that this has in its word: .09 for 31 tokens of 62 symbols, .20 for 16 of 14.

Deviations: Reformer's 0w0w is scored on both words, whose first cannot be known; here the second is scored alone. In
MAD's generator no blank follows the word's last token; here, as in Mamba's, it may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Natural, Positive, checked
from attention_zoo.rules import OneOf
from attention_zoo.tasks.generated import Generated, of
from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.placement import scattered
from attention_zoo.tasks.task import IGNORED, Batch

MARKER, BLANK, FIRST = 0, 1, 2
"""Ids; all from FIRST on are symbols."""


class Copying(Generated):
    """Copying with a gap, several times, reversed, or selective.

    Args:
        vocab: number of ids: the marker, the blank, and symbols.
        tokens: of the word; None: as many as a row holds (not if selective).
        gap: most blanks between word and marker.
        prefix: most blanks before all else.
        start: whether a marker also stands before the word.
        times: how often the word is asked for, one after another.
        reverse: whether it is asked for from its last token to its first.
        selective: whether its tokens stand among blanks, instead of together.
        feed: what is read while the word is asked for: "word", itself, one token late (teacher forcing); "blank", so
            that a model has to count; "marker", the same with markers, the first of which is the question itself.
        examples: number of distinct training rows, rounded up to whole batches; None draws new ones for ever.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "copy"
    objective = "causal_lm"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        vocab: Annotated[int, Field(ge=4, le=2**24)] = 64,
        tokens: Positive | None = None,
        gap: Natural = 0,
        prefix: Natural = 0,
        start: bool = True,
        times: Positive = 1,
        reverse: bool = False,
        selective: bool = False,
        feed: Annotated[str, OneOf("word", "blank", "marker")] = "word",
        examples: Positive | None = None,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        if selective and (tokens is None or gap or prefix):
            raise ValueError(
                f"selective places given tokens anywhere: it needs tokens and takes neither gap nor prefix, "
                f"got tokens={tokens}, gap={gap}, prefix={prefix}"
            )
        self.vocab, self.tokens, self.gap, self.prefix, self.start = vocab, tokens, gap, prefix, start and not selective
        self.times, self.reverse, self.selective, self.feed = times, reverse, selective, feed
        self.examples, self.test, self.test_examples = examples, tuple(test), test_examples

    def check(self, seq_len: int) -> None:
        least = self.start + self.prefix + self.gap + (1 + self.times) * (self.tokens or 1) + (self.feed == "blank")
        self.need(seq_len, least, "the word, what stands before and after it, and its copies")

    def word_length(self, length: int) -> int:
        """Tokens of the word in rows of `length`."""
        if self.tokens is not None:
            return self.tokens
        return (length - self.start - self.prefix - self.gap - (self.feed == "blank")) // (1 + self.times)

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        tokens = self.word_length(length)
        word = random.integers(FIRST, self.vocab, (rows, tokens))
        order = np.arange(tokens)[:: -1 if self.reverse else 1]
        order = np.tile(order, self.times)
        asked = len(order)
        ids = np.full((rows, length), BLANK)
        if self.selective:
            before = length - asked - (self.feed == "blank")
            column = scattered(random, rows, tokens, 1, before)
            marker = np.full((rows, 1), before)
        else:
            first = random.integers(0, self.prefix + 1, (rows, 1))
            if self.start:
                np.put_along_axis(ids, first, MARKER, axis=1)
            column = first + self.start + np.arange(tokens)
            marker = column[:, -1:] + 1 + random.integers(0, self.gap + 1, (rows, 1))
        np.put_along_axis(ids, column, word, axis=1)
        answer = word[:, order]
        question = marker + np.arange(asked) + (self.feed == "blank")
        np.put_along_axis(ids, marker, MARKER, axis=1)
        if self.feed == "marker":
            np.put_along_axis(ids, question, MARKER, axis=1)
        elif self.feed == "word":
            # one token late; the last is read only where a column is left for it
            room = np.concatenate([ids, np.full((rows, 1), BLANK)], axis=1)
            np.put_along_axis(room, question + 1, answer, axis=1)
            ids = room[:, :length]
        targets, distance = np.full((rows, length), IGNORED), np.full((rows, length), -1)
        np.put_along_axis(targets, question, answer, axis=1)
        np.put_along_axis(distance, question, question - column[:, order], axis=1)
        return of(ids, targets, groups={"distance": distance})

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "one symbol": torch.full_like(batch.targets, FIRST),
            "commonest symbol": commonest(batch.ids, FIRST, self.vocab).expand_as(batch.targets),
        }

    def chance(self, seq_len: int) -> float:
        return 1 / (self.vocab - FIRST)
