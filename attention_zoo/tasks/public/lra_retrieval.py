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

FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
WORDS = (b"0", b"1", b"0.0", b"1.0")
"""What a label may be: numbers as the release writes them, or as a spreadsheet does."""
SEPARATOR = 256


class Pairs:
    """The rows of one file."""

    def __init__(self, table: Table):
        self.table = table
        self.labels = table.labels("label", WORDS) % 2

    def ids(self, row: int, length: int) -> np.ndarray:
        half = (length - 1) // 2
        first, second = (
            np.frombuffer(self.table.field(row, column, half), np.uint8).astype(np.int64)
            for column in ("text1", "text2")
        )
        return np.concatenate([first, [SEPARATOR], second])


class LraRetrieval(Labelled):
    """Byte-level classification of pairs of papers.

    Args:
        path: the folder with the three files; hf:NAME for a copy on the hub.
        validation_rows: pairs looked at during training; null takes all.

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
    def __init__(self, *, path: Words | None = None, validation_rows: Positive | None = 1000):
        root = self.source.place(path)
        self.files = {split: root / name for split, name in FILES.items()}
        self.validation_rows = validation_rows

    @cached_property
    def parts(self) -> dict[str, Pairs]:
        return {split: Pairs(Table(file, COLUMNS, self.source, header=False)) for split, file in self.files.items()}

    def check(self, seq_len: int) -> None:
        if seq_len < 3:
            raise ValueError(f"seq_len must be at least 3, a byte of each text and the separator, got {seq_len}")
        super().check(seq_len)

    def types(self, ids: np.ndarray) -> np.ndarray:
        """0 up to the separator, 1 after it."""
        after = ids == SEPARATOR
        return np.cumsum(after, axis=1) - after

    def describe(self, seq_len: int) -> dict[str, Any]:
        files = described({file.name: file for file in self.files.values()}, self.source)
        sums = [entry["sha256"] for entry in files.values()]
        return {"files": files, "rows": self.counts(), "digest": digest(sums)}
