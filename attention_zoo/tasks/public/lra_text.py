"""Long-Range Arena's Text: whether a film review of IMDb is negative (0) or positive (1), byte by byte.

    ids  This is one of the best ...    label  1

Source: Tay et al. 2021, "Long Range Arena", §2.2.2; the reviews of Maas et al. 2011 as published, one .txt each in the
folders train/neg, train/pos, test/neg and test/pos, 12,500 in each. A token is a byte, rows are cut at seq_len (the
paper's length is 4,000; its files' code has 1,000).

Chance and "majority" are 50 %.

The benchmark has no validation set of its own: it looks at the test set during training, and so does the default here.
`validation=0.1` holds back a tenth of the training reviews instead (by a hash of the name, so the share never moves),
which is what an honest choice of a learning rate needs; the test set stays the same.

`compress` shortens each review, all of it, before it is cut at seq_len. It is done anew when a row is asked for, which
takes reading the file (and for "extractive" some milliseconds).

Deviations: padding is masked, not a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.compress import Compression, shortened
from attention_zoo.tasks.public.labelled import Labelled, Part, Rows
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.sums import described_folder
from attention_zoo.tasks.shortening import chosen, told
from attention_zoo.tasks.task import digest
from attention_zoo.tasks.text import list_files

FOLDERS = ("neg", "pos")
Held = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description="a share from 0 to below 1")]


class Reviews:
    """Files of two folders, the first's before the second's, each sorted by name.

    Args:
        files: name, path and size of each, and its label.
        how: each is shortened; None reads no more than is asked for.
    """

    def __init__(
        self, files: Sequence[tuple[str, Path, int]], labels: np.ndarray, source: Source, how: Compression | None
    ):
        self.files, self.labels, self.source, self.how = files, labels, source, how

    def ids(self, row: int, length: int) -> np.ndarray:
        try:
            with self.files[row][1].open("rb") as file:
                raw = file.read(length) if self.how is None else shortened(file.read(), self.how)[:length]
                return np.frombuffer(raw, np.uint8)
        except OSError as error:
            raise self.source.unreadable(error) from None


class LraText(Labelled):
    """Byte-level classification of IMDb's reviews.

    Args:
        path: the folder aclImdb; hf:NAME for a copy on the hub.
        validation: share of the training reviews held back for validation; 0 validates on the test set, as published.
        validation_rows: reviews looked at during training; null takes all.
        compress: how each review is shortened, {method, budget}; see `tasks/compress.py`. null leaves it whole.

    Raises:
        ValueError: for a missing folder, or one without reviews.
    """

    name = "lra_text"
    vocab, classes = 256, 2
    source = Source(
        "lra_text",
        "the folder aclImdb with train/ and test/, each with neg/*.txt and pos/*.txt",
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    )

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        validation: Held = 0.0,
        validation_rows: Positive | None = 1000,
        compress: Mapping[str, Any] | None = None,
    ):
        self.compression = chosen(compress)
        self.root = self.source.place(path)
        self.validation, self.validation_rows = validation, validation_rows
        self.split_by = f" with task.validation={validation}" if validation else ""

    @cached_property
    def reviews(self) -> dict[str, Reviews]:
        """All that is published for training, and for the test."""
        found = {}
        for split in ("train", "test"):
            files: list[tuple[str, Path, int]] = []
            labels: list[int] = []
            for label, folder in enumerate(FOLDERS):
                place = self.root / split / folder
                held = list_files(place, ".txt") if place.is_dir() else []
                if not held:
                    raise self.source.missing(place / "*.txt")
                files += [(f"{folder}/{name}", path, size) for name, path, size in held]
                labels += [label] * len(held)
            found[split] = Reviews(files, np.array(labels), self.source, self.compression)
        return found

    @cached_property
    def parts(self) -> dict[str, Rows]:
        train, test = self.reviews["train"], self.reviews["test"]
        if not self.validation:
            return {"train": train, "validation": test, "test": test}
        held = np.array([_place(name) < self.validation for name, _, _ in train.files])
        kept, back = np.flatnonzero(~held), np.flatnonzero(held)
        return {"train": Part(train, kept), "validation": Part(train, back), "test": test}

    def width(self, length: int) -> int:
        return length if self.compression is None else min(length, self.compression.budget)

    def describe(self, seq_len: int) -> dict[str, Any]:
        found = {split: described_folder(rows.files, self.source) for split, rows in self.reviews.items()}
        sums = [entry["sha256"] for entry in found.values()]
        about = {**found, "rows": self.counts(), "digest": digest([*sums, str(self.validation)])}
        if self.compression is not None:
            sizes = [size for rows in self.reviews.values() for _, _, size in rows.files]
            about["compress"] = told(self.compression, sizes)
        return about


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int(digest(["lra_text", name]), 16) / 2**64
