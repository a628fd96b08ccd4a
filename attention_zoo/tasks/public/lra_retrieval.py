"""Long-Range Arena's Retrieval: whether of two papers of the ACL Anthology Network one cites the other, by bytes.

    ids    f i r s t   p a p e r [SEP] t h e   o t h e r         label  1
    types  0 0 0 0 0 0 0 0 0 0 0   0   1 1 1 1 1 1 1 1 1         [SEP]: id 256

Source: Tay et al. 2021, "Long Range Arena", §2.2.3, on Radev et al. 2013. The files new_aan_pairs.train.tsv, .eval.tsv
and .test.tsv have five fields and no header: label (0 or 1), two ids, two texts. A release with the ids alone is
refused, since the texts are what is read.

Chance and "majority" are about 50 %.

Deviations: the paper encodes each text apart and compares the two vectors. Here one row holds both, with a separator
and token types, as BERT reads pairs, so that every mechanism takes part unchanged; attention may look from one text
into the other, which the paper's cannot, and figures are not those of its table. Each text is cut at half of the row,
(seq_len - 1) // 2 bytes: 8,001 tokens hold the published 4,000 of each. Padding is masked, not a token.

`compress` shortens each text, all of it, to the whole budget before it is cut: a row then has at most 2 * budget + 1
tokens. It is done anew when a row is asked for ("extractive" takes some ten milliseconds a text).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.compress import Compression, shortened
from attention_zoo.tasks.public.labelled import Labelled
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.sums import described
from attention_zoo.tasks.public.table import Table
from attention_zoo.tasks.shortening import chosen, told
from attention_zoo.tasks.task import digest

FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
TEXTS = COLUMNS[3:]
WORDS = (b"0", b"1", b"0.0", b"1.0")
"""What a label may be: numbers as the release writes them, or as a spreadsheet does."""
SEPARATOR = 256


class Pairs:
    """The rows of one file; texts are shortened where `how` says so."""

    def __init__(self, table: Table, how: Compression | None):
        self.table, self.how = table, how
        self.labels = table.labels("label", WORDS) % 2

    def ids(self, row: int, length: int) -> np.ndarray:
        half = (length - 1) // 2
        first, second = (np.frombuffer(self._text(row, column, half), np.uint8).astype(np.int64) for column in TEXTS)
        return np.concatenate([first, [SEPARATOR], second])

    def _text(self, row: int, column: str, most: int) -> bytes:
        if self.how is None:
            return self.table.field(row, column, most)
        return shortened(self.table.field(row, column), self.how)[:most]

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of all texts."""
        return np.concatenate([self.table.sizes(column) for column in TEXTS])


class LraRetrieval(Labelled):
    """Byte-level classification of pairs of papers.

    Args:
        path: the folder with the three files; hf:NAME for a copy on the hub.
        validation_rows: pairs looked at during training; null takes all.
        compress: how each text is shortened, {method, budget}; see `tasks/compress.py`. null leaves it whole.

    Raises:
        ValueError: for a missing file, or a line that is no pair with its label.
    """

    name = "lra_retrieval"
    vocab, classes = 257, 2
    source = Source(
        "lra_retrieval",
        "the folder with new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv, texts included",
        "https://storage.googleapis.com/long-range-arena/lra_release.gz (its folder tsv_data)",
    )

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        validation_rows: Positive | None = 1000,
        compress: Mapping[str, Any] | None = None,
    ):
        self.compression = chosen(compress)
        root = self.source.place(path)
        self.files = {split: root / name for split, name in FILES.items()}
        self.validation_rows = validation_rows

    @cached_property
    def parts(self) -> dict[str, Pairs]:
        return {
            split: Pairs(Table(file, COLUMNS, self.source, header=False), self.compression)
            for split, file in self.files.items()
        }

    def check(self, seq_len: int) -> None:
        if seq_len < 3:
            raise ValueError(f"seq_len must be at least 3, a byte of each text and the separator, got {seq_len}")
        super().check(seq_len)

    def width(self, length: int) -> int:
        return length if self.compression is None else min(length, 2 * self.compression.budget + 1)

    def types(self, ids: np.ndarray) -> np.ndarray:
        """0 up to the separator, 1 after it."""
        after = ids == SEPARATOR
        return np.cumsum(after, axis=1) - after

    def describe(self, seq_len: int) -> dict[str, Any]:
        files = described({file.name: file for file in self.files.values()}, self.source)
        sums = [entry["sha256"] for entry in files.values()]
        about = {"files": files, "rows": self.counts(), "digest": digest(sums)}
        if self.compression is not None:
            about["compress"] = told(self.compression, np.concatenate([part.sizes for part in self.parts.values()]))
        return about
