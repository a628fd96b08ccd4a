"""enwik8: the first 100,000,000 bytes of a dump of the English Wikipedia, markup and all, one byte a token.

    ids       <page>\\n    <title>AaA</titl
    targets   page>\\n    <title>AaA</title

Source: Mahoney 2011, "Large text compression benchmark" (the file, its size and MD5). The split into 90, 5 and 5
million bytes, in this order, is that of Dai et al. 2019 (Transformer-XL, §4.1) and all who compare with them. The main
metric is bits per byte; chance is 8.

The file is a memory map. From the archive it is unpacked into memory (100 MB), since deflated bytes have no places.

Deviations: by default the test figure is over `evaluation_rows` spans, each started afresh, not over every byte with an
unbroken memory; `evaluation_rows=null` takes all of them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import SPLITS, Part, Streams, mapped
from attention_zoo.tasks.public.sums import checksum, checksum_of, described
from attention_zoo.tasks.task import digest

PUBLISHED = (90_000_000, 5_000_000, 5_000_000)


class Enwik8(Streams):
    """Byte-level language modelling of enwik8.

    Args:
        path: the file enwik8 or enwik8.zip, or a folder with one of them; hf:NAME for a copy on the hub.
        split: bytes for training, validation and test, in this order; null: the published 90, 5 and 5 million.
        span: segments that a row follows the text.
        evaluation_rows: spans of each evaluation set, spread evenly; null takes all.
        compress: null; what other tasks over documents have here is refused, since one text has none.

    Raises:
        ValueError: for a missing file, or one whose size is not that of the split.
    """

    name = "enwik8"
    file: ClassVar[str] = "enwik8"
    md5: ClassVar[str] = "a1fa5ffddb56f4953e226637dabbb36a"
    source: ClassVar[Source] = Source(
        "enwik8", "the file enwik8 of 100000000 bytes, or enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"
    )

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        split: Sequence[Positive] | None = None,
        span: Positive = 4,
        evaluation_rows: Positive | None = 16,
        compress: Mapping[str, Any] | None = None,
    ):
        if compress is not None:
            raise ValueError(
                f"task.compress shortens documents and must be null for {self.name}, one text whose documents are not "
                f"told apart, got {dict(compress)}; take task=wikitext103 or task=pg19"
            )
        if split is not None and len(split) != len(SPLITS):
            raise ValueError(f"split must list bytes for training, validation and test, got {list(split)}")
        self.split = PUBLISHED if split is None else tuple(split)
        self.span, self.evaluation_rows = span, evaluation_rows
        self.path = self._file(self.source.place(path))

    def _file(self, place: Path) -> Path:
        if place.is_file():
            return place
        for name in (self.file, f"{self.file}.zip"):
            if (place / name).is_file():
                return place / name
        raise self.source.missing(place / self.file)

    @property
    def packed(self) -> bool:
        """Whether it is an archive, and if only by its name: one that was cut off is none by its bytes."""
        return self.path.suffix.lower() == ".zip" or zipfile.is_zipfile(self.path)

    @cached_property
    def data(self) -> np.ndarray:
        """All bytes, of the right number."""
        if self.packed:
            return np.frombuffer(self._unpacked(), np.uint8)
        found = mapped(self.path, self.source)
        self._check_size(len(found))
        return found

    def _unpacked(self) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                held = [entry for entry in archive.infolist() if not entry.is_dir()]
                if len(held) != 1:
                    names = [entry.filename for entry in held]
                    raise self.source.wrong(self.path, f"the archive must hold {self.file} alone", names)
                self._check_size(held[0].file_size)  # said by the archive: nothing is unpacked that would not do
                return archive.read(held[0])
        except OSError as error:
            raise self.source.unreadable(error) from None
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:  # damaged, or encrypted
            raise ValueError(f"{self.name}: {self.path} cannot be unpacked: {error}") from None

    def _check_size(self, size: int) -> None:
        if size != sum(self.split):
            raise self.source.wrong(
                self.path,
                f"the file must have {sum(self.split)} bytes, those of task.split={list(self.split)} "
                "(give task.split for another file)",
                size,
            )

    @cached_property
    def parts(self) -> dict[str, Part]:
        starts = np.cumsum([0, *self.split])
        return {
            name: Part(self.data[start:end], np.array([end - start]))
            for name, start, end in zip(SPLITS, starts.tolist(), starts[1:].tolist())
        }

    def check(self, seq_len: int) -> None:
        self.check_format()
        super().check(seq_len)

    def check_format(self) -> None:
        """Raise a ValueError for bytes that the text cannot hold. enwik8 may hold any."""

    def describe(self, seq_len: int) -> dict[str, Any]:
        sums = {
            kind: checksum_of(self.data, kind) if self.packed else checksum(self.path, self.source, kind)
            for kind in ("sha256", "md5")
        }
        return {
            "files": described({self.path.name: self.path}, self.source),
            "bytes": len(self.data),
            **sums,
            "published": sums["md5"] == self.md5,
            "split": list(self.split),
            "digest": digest([sums["sha256"], *map(str, self.split)]),
        }
