"""Long-Range Arena's ListOps: the value, 0 to 9, of a nested expression of MIN, MAX, MED (median) and SM (sum mod 10).

    Source   ( ( ( [MAX 2 ) ( ( ( [MIN 7 ) 1 ) ] ) ) ] )    ids  [MAX 2 [MIN 7 1 ] ]    label  2

Source: Tay et al. 2021, "Long Range Arena", §2.2.1, after Nangia & Bowman 2018; the published files basic_train.tsv
(96,000 rows), basic_val.tsv and basic_test.tsv (2,000 each), with the columns Source and Target. As in its input
pipeline, parentheses are dropped and what is left is parted at white space: digits are ids 0 to 9, then [MIN, [MAX,
[MED, [SM and ]. Rows of 500 to 2,000 tokens are cut at seq_len (published: 2,000, which cuts none).

Chance is 10 %. Baselines: "majority" (about 18 %) and "first_operator", the likeliest value in training for a row's
first operator: about 37 %, what most published models reach.

Deviations: padding is masked, not a token. The pipeline lost every ] until it was mended after publication; here they
stay.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.public.labelled import Labelled
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.sums import described
from attention_zoo.tasks.public.table import Table
from attention_zoo.tasks.task import digest

DIGITS = [b"%d" % digit for digit in range(10)]
VOCABULARY = {word: number for number, word in enumerate([*DIGITS, b"[MIN", b"[MAX", b"[MED", b"[SM", b"]"])}
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
COLUMNS = ("Source", "Target")
OPENING = 256
"""Bytes within which an expression's first operator stands: one parenthesis for each of its arguments."""


class Expressions:
    """The rows of one file."""

    def __init__(self, table: Table):
        self.table = table
        self.labels = table.labels("Target", DIGITS)

    def ids(self, row: int, length: int) -> np.ndarray:
        words = _words(self.table.field(row, "Source"))[:length]
        if not words:
            raise self._wrong(row, b"")
        found = [VOCABULARY.get(word, -1) for word in words]
        if -1 in found:
            raise self._wrong(row, words[found.index(-1)])
        return np.array(found)

    def _wrong(self, row: int, word: bytes) -> ValueError:
        rule = f"Source must be made of {', '.join(word.decode() for word in VOCABULARY)}"
        return self.table.source.wrong(self.table.path, rule, word.decode(errors="replace"), self.table.line(row))

    def operators(self) -> np.ndarray:
        """[N], the id of each row's first token."""
        openings = (_words(self.table.field(row, "Source", OPENING)) for row in range(len(self.labels)))
        return np.array([VOCABULARY.get(words[0], 0) if words else 0 for words in openings])


def _words(text: bytes) -> list[bytes]:
    return text.translate(None, b"()").split()


class LraListOps(Labelled):
    """Classification of ListOps' expressions by their value.

    Args:
        path: the folder with the three files; hf:NAME for a copy on the hub.
        validation_rows: rows looked at during training; null takes all.

    Raises:
        ValueError: for a missing file, or a line that is no expression with its value.
    """

    name = "lra_listops"
    vocab, classes = len(VOCABULARY), len(DIGITS)
    source = Source(
        "lra_listops",
        "the folder with basic_train.tsv, basic_val.tsv and basic_test.tsv",
        "https://storage.googleapis.com/long-range-arena/lra_release.gz (its folder listops-1000), or make them by "
        "lra_benchmarks/data/listops.py of https://github.com/google-research/long-range-arena",
    )

    @checked
    def __init__(self, *, path: Words | None = None, validation_rows: Positive | None = 1000):
        root = self.source.place(path)
        self.files = {split: root / name for split, name in FILES.items()}
        self.validation_rows = validation_rows

    @cached_property
    def parts(self) -> dict[str, Expressions]:
        return {
            split: Expressions(Table(file, COLUMNS, self.source, header=True)) for split, file in self.files.items()
        }

    def describe(self, seq_len: int) -> dict[str, Any]:
        files = described({file.name: file for file in self.files.values()}, self.source)
        sums = [entry["sha256"] for entry in files.values()]
        return {"files": files, "rows": self.counts(), "digest": digest(sums)}

    def baselines(self, seq_len: int) -> dict[str, float]:
        train, test = self.parts["train"], self.parts["test"]
        seen = np.zeros((self.vocab, self.classes), np.int64)
        np.add.at(seen, (train.operators(), train.labels), 1)
        right = seen.argmax(1)[test.operators()] == test.labels
        return {**super().baselines(seq_len), "first_operator": float(right.mean())}
