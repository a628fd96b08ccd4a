"""PG-19: 28,752 whole books from before 1919, one byte a token; published as folders train, validation and test.

    ids       CHAPTER I.\\r\\n\\r\\nIT was a
    targets   HAPTER I.\\r\\n\\r\\nIT was a d

Source: Rae et al. 2020, "Compressive Transformers for Long-Range Sequence Modelling", §4.1: 28,602, 50 and 100 books.
The main metric is bits per byte, chance is 8. `word_perplexity`, the paper's figure, is what the same loss comes to
when it is spread over words as the authors counted them: exp(loss · bytes / words), with the bytes of the test folder
here and the published 6,966,499 words of the test set; it is given where that folder holds all 100 books.

Books are memory maps; nothing of the 11 GB is read before a row asks for it, but that `describe` reads all once to name
them by their SHA-256 (`train_bytes` takes fewer).

`compress` shortens each book at the first use, one in memory at a time; what is left of all is one array, which with a
budget of 4,096 takes 118 MB. Other bytes are then predicted than the published ones: no `word_perplexity` is given, and
bits per byte compare with those of the same `compress` alone.

Deviations: bytes, where the paper has 32,000 subwords. A row reads one book (short ones are joined) for `span`
segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import SPLITS, Joined, Part, Streams, mapped
from attention_zoo.tasks.public.sums import described, described_folder
from attention_zoo.tasks.shortening import chosen, packed, told
from attention_zoo.tasks.task import digest
from attention_zoo.tasks.text import list_files

SOURCE = Source(
    "pg19",
    "a folder with train/, validation/ and test/, one .txt a book",
    "https://console.cloud.google.com/storage/browser/deepmind-gutenberg (see https://github.com/google-deepmind/pg19)",
)
TEST_BOOKS, TEST_WORDS = 100, 6_966_499


class Pg19(Streams):
    """Byte-level language modelling of PG-19.

    Args:
        path: the folder; hf:NAME for a copy on the hub.
        train_bytes: about how much of the training books to take; a fair sample of whole books. null takes all.
        span: segments that a row follows one book.
        evaluation_rows: spans of each evaluation set, spread evenly; null takes all.
        compress: how each book is shortened, {method, budget}; see `tasks/compress.py`. null leaves it whole.

    Raises:
        ValueError: for a missing folder, or one without books.
    """

    name = "pg19"

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        train_bytes: Annotated[int, Field(ge=1, le=2**62)] | None = None,
        span: Positive = 4,
        evaluation_rows: Positive | None = 16,
        compress: Mapping[str, Any] | None = None,
    ):
        self.compression = chosen(compress)
        self.root = SOURCE.place(path)
        self.train_bytes, self.span, self.evaluation_rows = train_bytes, span, evaluation_rows

    @cached_property
    def books(self) -> dict[str, list[tuple[str, Path, int]]]:
        """Name, path and size of each split's books, sorted by name."""
        found = {}
        for split in SPLITS:
            folder = self.root / split
            found[split] = list_files(folder, ".txt") if folder.is_dir() else []
            if not found[split]:
                raise SOURCE.missing(folder / "*.txt")
        if self.train_bytes is not None:
            found["train"] = _sample(found["train"], self.train_bytes)
        return found

    @cached_property
    def parts(self) -> dict[str, Part]:
        if self.compression is not None:
            return {
                split: Part(*packed((mapped(path, SOURCE) for _, path, _ in books), self.compression))
                for split, books in self.books.items()
            }
        joined = {split: Joined([entry[1:] for entry in books], SOURCE) for split, books in self.books.items()}
        return {split: Part(data, data.ends) for split, data in joined.items()}

    def describe(self, seq_len: int) -> dict[str, Any]:
        found = {split: described_folder(books, SOURCE) for split, books in self.books.items()}
        metadata = self.root / "metadata.csv"
        about = described({metadata.name: metadata}, SOURCE) if metadata.is_file() else {}
        sums = [found[split]["sha256"] for split in SPLITS]
        if self.compression is None:
            return {**found, **about, "digest": digest(sums)}
        sizes = [size for books in self.books.values() for _, _, size in books]
        done = told(self.compression, sizes)
        return {**found, **about, "compress": done, "digest": digest([*sums, *map(str, self.compression)])}

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        found = super().score(loss, accuracy)
        if self.compression is None and len(self.books["test"]) == TEST_BOOKS:
            exponent = loss * sum(size for _, _, size in self.books["test"]) / TEST_WORDS
            found["word_perplexity"] = math.exp(min(exponent, 700.0))  # an untrained model's is beyond any float
        return found


def _sample(books: Sequence[tuple[str, Path, int]], most: int) -> list[tuple[str, Path, int]]:
    """Books of about `most` bytes, at least one, chosen by a hash of their names."""
    order = sorted(books, key=lambda book: digest(["pg19", book[0]]))
    total = np.cumsum([size for _, _, size in order])
    return sorted(order[: max(1, int((total <= most).sum()))])
