"""Long-Range Arena's Image: which of ten things a picture of CIFAR-10 shows, read pixel by pixel in shades of grey.

    ids  32 x 32 greys of 0 to 255, row by row: 1,024 tokens    label  0 airplane ... 9 truck

Source: Tay et al. 2021, "Long Range Arena", §2.2.4, on Krizhevsky 2009. Read is the *binary version*: data_batch_1.bin
to data_batch_5.bin and test_batch.bin, records of one byte of label and 1,024 each of red, green and blue; the version
for Python holds pickles, which run what they hold, and is never opened. Grey is what the benchmark's code makes of
colours: the integer part of 255.5 · (0.2989 R + 0.5870 G + 0.1140 B) / 255.

Chance and "majority" are 10 %. A row is a whole picture: seq_len is 1,024.

Deviations: the benchmark trains on 90 % of the training pictures and validates on 10 %, in the order of its library's
own shuffled copy; here the last tenth of the files is for validation (45,000 and 5,000). The test set is as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.public.labelled import Labelled, Part, Rows
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import mapped
from attention_zoo.tasks.public.sums import described
from attention_zoo.tasks.task import digest

TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = ("test_batch.bin",)
PIXELS, CLASSES = 32 * 32, 10
RECORD = 1 + 3 * PIXELS
GREY = np.array([0.2989, 0.5870, 0.1140], np.float32)


class Pictures:
    """The records of some files, one after another."""

    def __init__(self, files: Sequence[Path], source: Source):
        self.files = [_records(file, source) for file in files]
        self.ends = np.cumsum([len(records) for records in self.files])
        self.labels = np.concatenate([records[:, 0] for records in self.files]).astype(np.int64)

    def ids(self, row: int, length: int) -> np.ndarray:
        file = int(np.searchsorted(self.ends, row, side="right"))
        record = self.files[file][row - (self.ends[file - 1] if file else 0)]
        return grey(record[1:].reshape(3, PIXELS))[:length]


def grey(colours: np.ndarray) -> np.ndarray:
    """[3, N] red, green and blue -> [N], all from 0 to 255."""
    shade = GREY @ (colours.astype(np.float32) * np.float32(1 / 255))
    return (shade * np.float32(255.5)).astype(np.uint8)


def _records(file: Path, source: Source) -> np.ndarray:
    if not file.is_file():
        raise source.missing(file)
    data = mapped(file, source)
    if len(data) % RECORD or not len(data):
        raise source.wrong(file, f"the file must hold whole records of {RECORD} bytes", len(data), "size in bytes")
    records = data.reshape(-1, RECORD)
    odd = np.flatnonzero(records[:, 0] >= CLASSES)
    if len(odd):
        raise source.wrong(file, "the label must be 0 to 9", int(records[odd[0], 0]), f"record {int(odd[0]) + 1}")
    return records


class LraImage(Labelled):
    """Classification of CIFAR-10's pictures in shades of grey.

    Args:
        path: the folder cifar-10-batches-bin; hf:NAME for a copy on the hub.
        validation_rows: pictures looked at during training; null takes all.

    Raises:
        ValueError: for a missing file, or one that does not hold records.
    """

    name = "lra_image"
    vocab, classes = 256, CLASSES
    length = PIXELS
    source = Source(
        "lra_image",
        "the folder cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin and test_batch.bin",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (the binary version, not the one for Python)",
    )

    @checked
    def __init__(self, *, path: Words | None = None, validation_rows: Positive | None = 1000):
        self.root = self.source.place(path)
        self.validation_rows = validation_rows

    @cached_property
    def parts(self) -> dict[str, Rows]:
        train, test = (Pictures([self.root / name for name in names], self.source) for names in (TRAIN, TEST))
        kept = len(train.labels) * 9 // 10
        order = np.arange(len(train.labels))
        return {"train": Part(train, order[:kept]), "validation": Part(train, order[kept:]), "test": test}

    def describe(self, seq_len: int) -> dict[str, Any]:
        counts = self.counts()  # first: what is missing is named
        files = described({name: self.root / name for name in (*TRAIN, *TEST)}, self.source)
        return {"files": files, "rows": counts, "digest": digest([entry["sha256"] for entry in files.values()])}
