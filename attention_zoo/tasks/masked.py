"""Masked language modelling on bytes, and one question for the row: are its two halves in order?

    bytes    d e f   m a i n   of a document, cut in two halves and here swapped
    ids     CLS  M  n SEP  d  M  f  M SEP  .        M: mask, .: padding
    targets  .   a  .  .   .  e  .  m  .   .        .: not scored (shortened)
    types    0   0  0  0   1  1  1  1  1   0
    labels  order: 1, since they were swapped

Source: BERT (Devlin et al. 2019, §3.1): 15 % of the bytes are asked for; 80 % of those read as MASK, 10 % as a random
byte, 10 % as they are. `pair` is one of

    order   the two halves of a piece of text, swapped in every second row (sentence order, Lan et al. 2020, §3.1)
    next    the second half is in every second row that of another document, as long as the first
    none    one piece of text, no question

Which text, and how it is split: see `documents`. An evaluation set is all of its part, piece after piece, with masks
that are always the same; training draws pieces and masks anew for each step. What is shorter than a row is padded.

Chance: 8 bits; 50 %. The bar is a two-sided order-3 n-gram (`ngrams`), which reads what the model reads and no more:
1.5 bits on the standard library, the unigram 4.2. The label's bar is a bag of bytes (`further_baselines`): a logistic
regression on how often each byte stands in either half, and on how far these differ. On the order it reaches 51 % with
halves of 126 bytes, 53 % with 510. "next" falls to it, since files differ in their bytes: 71 and 75 %. It is there
because BERT was trained so; use "order" to compare.

Deviations: tokens are bytes, a masked one is no word. The halves are cut at any byte, not between sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.rules import OneOf
from attention_zoo.tasks.corpus import Corpus
from attention_zoo.tasks.documents import NAMES, Between, DocumentTask
from attention_zoo.tasks.generated import of
from attention_zoo.tasks.ngrams import NAME, two_sided
from attention_zoo.tasks.task import IGNORED, Batch, generator

CLS, SEP, MASK = 256, 257, 258
PAIRS = ("order", "next", "none")
SHORTEST = 16
"""Bytes of a piece of text, at least, for it to be evaluated."""
PLACES = 8192
"""Masked bytes that the two-sided n-gram is scored on, spread evenly: its standard error is 0.03 bits."""
BAG_ROWS = 4000
"""Training rows that the bag of bytes is fitted to."""


class Pieces(NamedTuple):
    """Two pieces of text for each row: the second half is taken from `second`.

    Fields:
        first, second: [B], where they begin in the text.
        half: [B], bytes of each half; of the whole, where there is one piece.
        label: [B], 1 where the halves are swapped, or do not belong together.
    """

    first: np.ndarray
    second: np.ndarray
    half: np.ndarray
    label: np.ndarray


class MaskedText(DocumentTask):
    """Masked language modelling, with a question about a pair of pieces.

    Args:
        mask: share of the bytes that are asked for.
        pair: "order", "next" or "none"; see the module.
        evaluation_rows: pieces of each evaluation set, evenly over its text; None takes all.
        options: of `DocumentTask`: which text, and how it is split.

    Raises:
        ValueError: for a missing path or package, naming it.
    """

    name = "mlm"
    objective = "masked_lm"
    vocab = 259
    metric, better = "bits_per_masked_byte", "lower"

    @checked
    def __init__(
        self,
        *,
        mask: Between = 0.15,
        pair: Annotated[str, OneOf(*PAIRS)] = "order",
        evaluation_rows: Positive | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.mask, self.pair, self.evaluation_rows = mask, pair, evaluation_rows
        self.classes = None if pair == "none" else 2

    def check(self, seq_len: int) -> None:
        if seq_len < SHORTEST + 3:
            raise ValueError(f"seq_len must leave {SHORTEST} bytes beside CLS and SEP, {SHORTEST + 3}, got {seq_len}")
        for name, corpus in self.corpora.items():
            if self.pair == "next" and len(corpus.ends) < 2:
                raise ValueError(f"task.pair=next needs two documents for {NAMES[name]}, got {len(corpus.ends)}")
            if not len(self._places(corpus, seq_len)[0]):
                raise ValueError(
                    f"task.path={self.source} must hold a document of at least {SHORTEST} bytes for {NAMES[name]}, "
                    f"got {len(corpus.data)} bytes in {len(corpus.ends)}{self.shortened}"
                )

    def _room(self, seq_len: int) -> int:
        return seq_len - 2 if self.pair == "none" else (seq_len - 3) // 2 * 2

    def _places(self, corpus: Corpus, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the pieces for evaluation begin, and how long they are: all of the text, one after another."""
        room = self._room(seq_len)
        found = []
        for start, end in zip(_starts(corpus), corpus.ends):
            begin = np.arange(start, end, room)
            found.append(np.stack([begin, np.minimum(end - begin, room)]))
        start, length = np.concatenate(found, axis=1)
        return start[length >= SHORTEST], length[length >= SHORTEST]

    def _draw(self, random: np.random.Generator, corpus: Corpus, rows: int, seq_len: int) -> Batch:
        """Rows from anywhere in the text: a byte, and a piece around it that lies inside its document."""
        room = self._room(seq_len)
        at = random.integers(0, len(corpus.data), rows)
        document = np.searchsorted(corpus.ends, at, side="right")
        first, last = _starts(corpus)[document], corpus.ends[document]
        length = np.minimum(last - first, room)
        start = np.clip(at - random.integers(0, room, rows), first, last - length)
        return self._batch(random, corpus, start, length, seq_len)

    def _batch(
        self, random: np.random.Generator, corpus: Corpus, start: np.ndarray, length: np.ndarray, seq_len: int
    ) -> Batch:
        pieces = self._pieces(random, corpus, start, length)
        whole, half = self.pair == "none", pieces.half[:, None]
        column = np.arange(seq_len)[None]
        ahead = (column >= 1) & (column <= half)
        behind = (column >= half + 2) & (column < 2 * half + 2) & (not whole)
        valid = column < (half + 2 if whole else 2 * half + 3)
        source = np.where(ahead, pieces.first[:, None] + column - 1, 0)
        source = np.where(behind, pieces.second[:, None] + column - 2 - half, source)
        text = ahead | behind
        ids = np.where(text, corpus.data[source], np.where(valid, SEP, 0)).astype(np.int64)
        ids[:, 0] = CLS
        asked = text & (random.random(ids.shape) < self.mask)
        targets = np.where(asked, ids, IGNORED)
        fate = random.random(ids.shape)
        ids = np.where(asked & (fate < 0.8), MASK, ids)
        ids = np.where(asked & (fate >= 0.8) & (fate < 0.9), random.integers(0, 256, ids.shape), ids)
        if whole:
            return of(ids, targets, valid=valid)
        types = (valid & (column >= half + 2)).astype(np.int64)
        return of(ids, targets, valid=valid, types=types, labels={self.pair: pieces.label})

    def _pieces(self, random: np.random.Generator, corpus: Corpus, start: np.ndarray, length: np.ndarray) -> Pieces:
        rows = len(start)
        if self.pair == "none":
            return Pieces(start, start, length, np.zeros(rows, np.int64))
        label, half = random.integers(0, 2, rows), length // 2
        if self.pair == "order":
            return Pieces(start + label * half, start + (1 - label) * half, half, label)
        # a byte of any other document; both kinds of row are cut to what it has, so that lengths tell nothing
        document = np.searchsorted(corpus.ends, start, side="right")
        first, last = _starts(corpus)[document], corpus.ends[document]
        at = (last + (random.random(rows) * (len(corpus.data) - (last - first))).astype(np.int64)) % len(corpus.data)
        other = np.searchsorted(corpus.ends, at, side="right")
        half = np.minimum(half, corpus.ends[other] - _starts(corpus)[other])
        at = np.minimum(at, corpus.ends[other] - half)
        return Pieces(start, np.where(label == 1, at, start + half), half, label)

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> MaskedBatches:
        self.check(seq_len)
        return MaskedBatches(self, batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, MaskedSet]:
        self.check(seq_len)
        return {name: MaskedSet(self, name, batch_size, seq_len) for name in self.corpora if name != "train"}

    def whole(self, name: str, seq_len: int) -> Batch:
        """All rows of an evaluation set."""
        corpus = self.corpora[name]
        start, length = self._places(corpus, seq_len)
        count = min(self.evaluation_rows or len(start), len(start))
        picked = np.linspace(0, len(start) - 1, count).round().astype(int)
        return self._batch(generator("mlm", name, seq_len), corpus, start[picked], length[picked], seq_len)

    def training(self, key: Sequence[int | str], rows: int, seq_len: int) -> Batch:
        """Training rows that depend on `key` and the task's options alone."""
        return self._draw(generator("mlm", "train", *key, seq_len), self.corpora["train"], rows, seq_len)

    def chance(self, seq_len: int) -> float:
        return 8.0

    def baselines(self, seq_len: int) -> dict[str, float]:
        """Of the two-sided n-gram, and of the unigram; both also take a byte that stands there for half right.

        A byte that is asked for and reads as one is as likely to be the right one as to be drawn at random.
        """
        batch, train = self.whole(self.judged, seq_len), self.corpora["train"]
        rows, columns = np.nonzero(batch.targets.numpy() != IGNORED)
        picked = np.unique(np.linspace(0, len(rows) - 1, min(PLACES, len(rows))).round().astype(int))
        rows, columns = rows[picked], columns[picked]
        ids = batch.ids.numpy()
        if batch.tokens is not None:
            ids = np.where(batch.tokens.valid.numpy(), ids, SEP)
        right, stands = batch.targets.numpy()[rows, columns], ids[rows, columns]
        found = {}
        alone = np.full_like(ids, SEP)
        for name, read in ((f"two-sided {NAME}", ids), ("unigram", alone)):
            chance = two_sided(train, read, rows, columns)
            shown = np.flatnonzero(stands < 256)
            weight = np.full((len(shown), 256), 0.5 / 256)
            weight[np.arange(len(shown)), stands[shown]] += 0.5
            chance[shown] *= weight
            chance[shown] /= chance[shown].sum(1, keepdims=True)
            found[name] = float(-np.log2(chance[np.arange(len(rows)), right]).mean())
        return found

    def further_baselines(self, seq_len: int) -> dict[str, dict[str, float]]:
        """Accuracy on the pair's label of what reads how often each byte stands in either half."""
        if self.pair == "none":
            return {}
        weights = _fit(*self._bag(self.training(("bag",), BAG_ROWS, seq_len)))
        histogram, label = self._bag(self.whole(self.judged, seq_len))
        accuracy = float(((histogram @ weights > 0) == (label == 1)).mean())
        return {f"{self.pair}_accuracy": {"bag of bytes": accuracy, "chance": 0.5}}

    def _bag(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        ids = batch.ids.numpy()
        types = np.zeros_like(ids) if batch.types is None else batch.types.numpy()
        cell = np.arange(len(ids))[:, None] * 512 + types * 256 + ids
        seen = (ids < 256) if batch.tokens is None else (ids < 256) & batch.tokens.valid.numpy()
        counts = np.bincount(cell[seen], minlength=len(ids) * 512).reshape(len(ids), 512)
        share = np.sqrt(counts / np.maximum(1, counts.sum(1, keepdims=True)))
        apart = np.abs(share[:, :256] - share[:, 256:])
        return np.concatenate([share, apart, np.ones((len(ids), 1))], axis=1), batch.labels[self.pair].numpy()

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"bits_per_masked_byte": loss / math.log(2), "loss": loss, "accuracy": accuracy}


def _starts(corpus: Corpus) -> np.ndarray:
    return np.concatenate([[0], corpus.ends[:-1]]).astype(np.int64)


def _fit(features: np.ndarray, label: np.ndarray, steps: int = 8, ridge: float = 1.0) -> np.ndarray:
    """Weights of a logistic regression, by Newton's method."""
    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-(features @ weights).clip(-30, 30)))
        slope = features.T @ (chance - label) + ridge * weights
        curve = (features * (chance * (1 - chance))[:, None]).T @ features + ridge * np.eye(len(weights))
        weights -= np.linalg.solve(curve, slope)
    return weights


class MaskedBatches:
    """Training batches; the place in them is a single number."""

    def __init__(self, task: MaskedText, batch_size: int, seq_len: int, seed: int):
        self.task, self.batch_size, self.seq_len, self.seed, self.step = task, batch_size, seq_len, seed, 0

    def __iter__(self) -> MaskedBatches:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        return self.task.training((self.seed, self.step - 1), self.batch_size, self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])


class MaskedSet:
    """One evaluation set: the same rows and masks whatever the training seed and the batch size."""

    def __init__(self, task: MaskedText, name: str, batch_size: int, seq_len: int):
        self.task, self.name, self.batch_size, self.seq_len = task, name, batch_size, seq_len

    def __iter__(self) -> Iterator[Batch]:
        whole = self.task.whole(self.name, self.seq_len)
        for start in range(0, len(whole.ids), self.batch_size):
            yield whole.rows(slice(start, start + self.batch_size))
