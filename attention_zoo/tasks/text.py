"""Byte-level language modelling on real text: a token is a byte, the vocabulary is 256. `documents` says which text.

Rows are streams: row b of a batch goes on in row b of the next, segment by segment, up to `span` segments of one
document; then the row takes the next document and is flagged `fresh`. That is what truncated backpropagation needs.
Evaluation takes every document, unless `evaluation_rows` picks some spans.

Evaluation batches tell recall hits apart (`groups["recall"]`): bytes that end a string of nine or more which stood d
bytes before in the same row, over all of its segments; the group is d. See `repeats`.

Chance is 8 bits. The bar is an order-3 n-gram of the same training bytes (`ngrams`), 2.1 bits on the standard library;
the unigram reaches 4.5. Its contexts are the bytes before in the text, at a row's start, too.

Deviations from file = document: neighbouring short files (sorted order, same part) are joined until they fill a span,
since most sources are shorter than a long row and would be lost. The end of a document that fills no whole segment is
cut off; in training, where segments start moves at each epoch, so that no byte is always lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from attention_zoo.options import Positive, checked
from attention_zoo.tasks.corpus import (
    OWN_SKIPPED,
    SKIPPED,
    Corpus,
    existing,
    join_files,
    list_files,
    read_files,
    split_files,
)
from attention_zoo.tasks.documents import NAMES, Bytes, DocumentTask
from attention_zoo.tasks.ngrams import bits_per_byte
from attention_zoo.tasks.repeats import recall_distance
from attention_zoo.tasks.task import Batch, generator

__all__ = [
    "OWN_SKIPPED", "SKIPPED", "Bytes", "Corpus", "Spans", "Text", "TextBatches", "TextSet", "cut_spans", "existing",
    "join_files", "list_files", "read_files", "split_files",
]  # fmt: skip


TOKENS = 1024
"""Of an evaluation batch, at least: a text in rows of a few tokens would take as many calls as it has bytes."""


class Spans(NamedTuple):
    """The pieces that rows take one after another: [start, segments, slack], slack = how far it may be moved."""

    start: np.ndarray
    segments: np.ndarray
    slack: np.ndarray


def cut_spans(ends: np.ndarray, seq_len: int, span: int) -> Spans:
    """Join short files into documents, and cut documents into spans of at most `span` segments of `seq_len` tokens."""
    found = [np.zeros((3, 0), np.int64)]
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end - start <= span * seq_len and index + 1 < len(ends):
            continue  # too short by itself: goes on in the next file
        segments = (end - start - 1) // seq_len  # one byte more than a segment: the last token's target
        slack = (end - start - 1) - segments * seq_len
        first = np.arange(0, segments, span)
        found.append(
            np.stack([start + first * seq_len, np.minimum(span, segments - first), np.full_like(first, slack)])
        )
        start = end
    return Spans(*np.concatenate(found, axis=1))


class Text(DocumentTask):
    """Byte-level language modelling.

    Args:
        span: segments that a row follows one document, at most: what a carried state can reach back over.
        evaluation_rows: spans of each evaluation set, evenly over its text; None takes all.
        options: of `DocumentTask`: which text, and how it is split.

    Raises:
        ValueError: for a missing path or package, naming it.
    """

    name = "text"
    vocab = 256
    streams = True
    metric, better = "bits_per_byte", "lower"

    @checked
    def __init__(self, *, span: Positive = 4, evaluation_rows: Positive | None = None, **options: Any):
        super().__init__(**options)
        self.span, self.evaluation_rows = span, evaluation_rows

    def check(self, seq_len: int) -> None:
        for name in self.corpora.keys() - {"held_out"}:
            self._spans(name, seq_len)

    def _spans(self, name: str, seq_len: int) -> Spans:
        corpus = self.corpora[name]
        spans = cut_spans(corpus.ends, seq_len, self.span)
        if not len(spans.start):
            raise ValueError(
                f"seq_len must be smaller than a document, got {seq_len}: {self.source} has {len(corpus.data)} bytes "
                f"for {NAMES[name]}{self.shortened}; give a smaller seq_len or more text"
            )
        return spans

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> TextBatches:
        return TextBatches(self.corpora["train"].data, self._spans("train", seq_len), batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, TextSet]:
        return {
            name: TextSet(corpus.data, self._spans(name, seq_len), batch_size, seq_len, self.evaluation_rows)
            for name, corpus in self.corpora.items()
            if name != "train"
        }

    def chance(self, seq_len: int) -> float:
        return 8.0

    def baselines(self, seq_len: int) -> dict[str, float]:
        judged = self.evaluation_sets(1, seq_len)[self.judged]
        return bits_per_byte(self.corpora["train"], judged.data, judged.places())

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"bits_per_byte": loss / math.log(2), "loss": loss, "accuracy": accuracy}


def _segment(window: np.ndarray, fresh: np.ndarray, recall: np.ndarray | None = None) -> Batch:
    """A batch from bytes [B, L + 1], and of evaluation from how far back each target stood, [B, L]."""
    bytes_ = torch.from_numpy(window).long()
    groups = {} if recall is None else {"recall": torch.from_numpy(np.ascontiguousarray(recall))}
    ids, targets = bytes_[:, :-1].contiguous(), bytes_[:, 1:].contiguous()
    return Batch(ids, targets, None, torch.from_numpy(fresh), groups=groups)


class TextBatches:
    """Training streams: each epoch takes every span once, in an order drawn from (seed, epoch)."""

    def __init__(self, data: np.ndarray, spans: Spans, batch_size: int, seq_len: int, seed: int):
        self.data, self.spans, self.seq_len, self.seed = data, spans, seq_len, seed
        self.epoch, self.taken = -1, len(spans.start)  # the first span asked for opens epoch 0
        self.order = self.moved = np.zeros(0, dtype=np.int64)
        self.at = np.zeros(batch_size, dtype=np.int64)  # first byte of each row's next segment
        self.left = np.zeros(batch_size, dtype=np.int64)  # segments left in each row's span

    def __iter__(self) -> TextBatches:
        return self

    def _open(self, epoch: int) -> None:
        random = generator("text", self.seed, epoch)
        self.epoch, self.order = epoch, random.permutation(len(self.spans.start))
        self.moved = np.floor(random.random(len(self.order)) * (self.spans.slack + 1)).astype(np.int64)

    def _take(self, row: int) -> None:
        if self.taken == len(self.spans.start):
            self._open(self.epoch + 1)
            self.taken = 0
        index = self.order[self.taken]
        self.taken += 1
        self.at[row] = self.spans.start[index] + self.moved[index]
        self.left[row] = self.spans.segments[index]

    def __next__(self) -> Batch:
        fresh = self.left == 0
        for row in np.flatnonzero(fresh).tolist():
            self._take(row)
        batch = _segment(self.data[self.at[:, None] + np.arange(self.seq_len + 1)], fresh)
        self.at += self.seq_len
        self.left -= 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "taken": int(self.taken),
            "at": self.at.tolist(),
            "left": self.left.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["epoch"] >= 0:
            self._open(state["epoch"])
        self.taken = state["taken"]
        self.at = np.array(state["at"], dtype=np.int64)
        self.left = np.array(state["left"], dtype=np.int64)


class TextSet:
    """Evaluation streams: spans of the text, each started afresh and followed to its end.

    Args:
        batch_size: rows of a batch; more where these have fewer than `TOKENS` tokens.
        rows: how many spans are picked, evenly over the text; None takes all.
    """

    def __init__(self, data: np.ndarray, spans: Spans, batch_size: int, seq_len: int, rows: int | None):
        total = len(spans.start)
        picked = np.unique(np.linspace(0, total - 1, min(rows or total, total)).round().astype(int))
        # rows of a batch end together, so spans of as many segments stand together; the longest first
        picked = picked[np.argsort(-spans.segments[picked], kind="stable")]
        self.data, self.seq_len, self.batch_size = data, seq_len, max(batch_size, TOKENS // seq_len)
        self.start, self.segments = spans.start[picked], spans.segments[picked]

    def __iter__(self) -> Iterator[Batch]:
        for segments in np.unique(self.segments)[::-1].tolist():
            starts = self.start[self.segments == segments]
            for first in range(0, len(starts), self.batch_size):
                yield from self._rows(starts[first : first + self.batch_size], segments)

    def _rows(self, start: np.ndarray, segments: int) -> Iterator[Batch]:
        L = self.seq_len
        whole = self.data[start[:, None] + np.arange(segments * L + 1)]
        recall = recall_distance(whole)
        for at in range(0, segments * L, L):
            fresh = np.full(len(start), at == 0)
            yield _segment(whole[:, at : at + L + 1], fresh, recall[:, at + 1 : at + L + 1])

    def places(self) -> np.ndarray:
        """Where the scored bytes stand in the text."""
        lengths = self.segments * self.seq_len
        return np.concatenate([start + 1 + np.arange(length) for start, length in zip(self.start, lengths)])
