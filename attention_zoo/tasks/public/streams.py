"""Language modelling on published splits: training, validation and test each from their own bytes or words.

Rows are streams, as in `tasks/text.py`: row b of a batch goes on in row b of the next, up to `span` segments of one
document. A text larger than memory is never read whole: it is a memory map, or `Joined` memory maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.task import Task
from attention_zoo.tasks.text import Spans, TextBatches, TextSet, cut_spans

SPLITS = ("train", "validation", "test")


class Part(NamedTuple):
    """The text of one split.

    Fields:
        data: token ids, an array or what is indexed like one.
        ends: where each document ends in it.
    """

    data: Any
    ends: np.ndarray


class Joined:
    """Files one after another, as one array of bytes that is read where it is looked at.

    Args:
        files: path and size of each, none empty.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], source: Source):
        self.paths, self.source = [path for path, _ in files], source
        self.ends = np.cumsum([size for _, size in files], dtype=np.int64)
        self.map = lru_cache(maxsize=256)(self._map)  # a map takes no memory of its own, but there may be 30,000

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _map(self, index: int) -> np.ndarray:
        return mapped(self.paths[index], self.source)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        found = np.empty(at.shape, np.uint8)
        file = np.searchsorted(self.ends, at, side="right")
        for index in np.unique(file).tolist():
            here = file == index
            found[here] = self.map(index)[at[here] - (self.ends[index - 1] if index else 0)]
        return found


def mapped(path: Path, source: Source) -> np.ndarray:
    """The bytes of a file, read where they are looked at."""
    try:
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise source.unreadable(error) from None


class Streams(Task):
    """Base of tasks whose text comes in three parts. A subclass gives `parts`, `describe`, and a name.

    Attributes:
        span: segments that a row follows one document, at most.
        evaluation_rows: spans of each evaluation set, spread evenly; None takes all.
    """

    streams = True
    metric, better = "bits_per_byte", "lower"
    vocab = 256
    span: int
    evaluation_rows: int | None

    @property
    def parts(self) -> dict[str, Part]:
        """Training, validation and test, by the names of `SPLITS`."""
        raise NotImplementedError

    def spans(self, split: str, seq_len: int) -> Spans:
        """The pieces of a split that rows take.

        Raises:
            ValueError: if a row is longer than the text.
        """
        known: dict[tuple[str, int], Spans] = self.__dict__.setdefault("_spans", {})
        if (split, seq_len) not in known:
            part = self.parts[split]
            known[split, seq_len] = cut_spans(part.ends, seq_len, self.span)
            if not len(known[split, seq_len].start):
                raise ValueError(
                    f"seq_len must be smaller than the text, got {seq_len}: "
                    f"{self.name} has {len(part.data)} tokens for {split}"
                )
        return known[split, seq_len]

    def check(self, seq_len: int) -> None:
        for split in SPLITS:
            self.spans(split, seq_len)

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> TextBatches:
        return TextBatches(self.parts["train"].data, self.spans("train", seq_len), batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, TextSet]:
        sets = {}
        for split in SPLITS[1:]:
            spans = self.spans(split, seq_len)
            rows = self.evaluation_rows or len(spans.start)
            sets[split] = TextSet(self.parts[split].data, spans, batch_size, seq_len, rows)
        return sets

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"bits_per_byte": loss / math.log(2), "loss": loss, "accuracy": accuracy}
