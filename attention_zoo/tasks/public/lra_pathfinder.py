"""Long-Range Arena's Pathfinder: whether one dashed line joins the two dots of a drawing (1) or not (0), by pixels.

    ids  32 x 32 greys of 0 to 255, row by row: 1,024 tokens (Path-X: 128 x 128, 16,384 tokens)    label  0 or 1

Source: Tay et al. 2021, "Long Range Arena", §2.2.5 and §2.2.6, on Linsley et al. 2018 and Kim et al. 2020. A folder for
each difficulty (easy curv_baseline, intermediate curv_contour_length_9, hard curv_contour_length_14) holds imgs/*/*.png
and metadata/*.npy. In spite of their ending those are text, one drawing a line: folder, file, number, label and the
generator's settings, between spaces; a true .npy array of such lines is read, too, but never one that holds pickles.

Chance and "majority" are 50 %. A row is a whole drawing: seq_len is 1,024 or 16,384. Images need the package Pillow.

Deviations: the benchmark takes 80, 10 and 10 % in its library's own shuffled order; here the order is drawn once from a
fixed key over the drawings sorted by metadata file and line. As there, drawings whose file is empty are left out.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.rules import OneOf
from attention_zoo.tasks.public.labelled import Labelled, Part, Rows
from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.sums import described_folder
from attention_zoo.tasks.task import digest, generator

LEVELS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
ARRAY = b"\x93NUMPY"
"""How a true .npy file begins."""


class Drawings:
    """The drawings of one difficulty.

    Args:
        files: name, path and size of each, and its label.
    """

    def __init__(self, files: list[tuple[str, Path, int]], labels: np.ndarray, side: int, source: Source):
        self.files, self.labels, self.side, self.source = files, labels, side, source

    def ids(self, row: int, length: int) -> np.ndarray:
        path = self.files[row][1]
        found = _pixels(path, self.source)
        if found.shape != (self.side, self.side):
            raise self.source.wrong(path, f"the image must have {self.side} x {self.side} pixels", found.shape)
        return found.reshape(-1)[:length]


def _pixels(path: Path, source: Source) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"task={source.task} reads images with the package Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow has all three for a damaged file
        raise source.wrong(path, "the file must be an image", " ".join(str(error).split())) from None


class LraPathfinder(Labelled):
    """Classification of Pathfinder's drawings.

    Args:
        path: the folder pathfinder32 (Path-X: pathfinder128), or that of one difficulty; hf:NAME for a copy on the hub.
        level: easy | intermediate | hard.
        side: pixels of a drawing's side, 32 or 128 (Path-X), 64 or 256.
        validation_rows: drawings looked at during training; null takes all.

    Raises:
        ValueError: for a missing folder or image, or a line of metadata that names none.
    """

    name = "lra_pathfinder"
    vocab, classes = 256, 2

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        level: Annotated[str, OneOf(*LEVELS)] = "hard",
        side: Annotated[int, OneOf(32, 64, 128, 256)] = 32,
        validation_rows: Positive | None = 1000,
    ):
        self.name = {32: "lra_pathfinder32", 128: "lra_pathx"}.get(side, f"lra_pathfinder{side}")  # type: ignore[misc]
        self.source = Source(  # type: ignore[misc]
            self.name,
            f"the folder pathfinder{side} with {LEVELS[level]}/metadata/*.npy and {LEVELS[level]}/imgs/*/*.png",
            "https://storage.googleapis.com/long-range-arena/lra_release.gz",
        )
        place = self.source.place(path)
        self.root = place if place.name == LEVELS[level] else place / LEVELS[level]
        self.level, self.side, self.length, self.validation_rows = level, side, side * side, validation_rows

    @cached_property
    def drawings(self) -> Drawings:
        """All drawings whose file is not empty, by metadata file and line."""
        metadata = self.root / "metadata"
        lists = sorted(metadata.glob("*.npy"), key=lambda path: (len(path.stem), path.stem))  # 2 before 10
        if not lists:
            raise self.source.missing(metadata / "*.npy")
        files: list[tuple[str, Path, int]] = []
        labels: list[int] = []
        for listed in lists:
            for number, line in enumerate(_lines(listed, self.source), 1):
                name, label = self._entry(listed, number, line)
                try:
                    size = (self.root / name).stat().st_size
                except (OSError, ValueError):  # a name that no file can have
                    rule = "each line must name an image that is there"
                    raise self.source.wrong(listed, rule, name, f"line {number}") from None
                if size:
                    files.append((name, self.root / name, size))
                    labels.append(label)
        return Drawings(files, np.array(labels, np.int64), self.side, self.source)

    def _entry(self, listed: Path, number: int, line: str) -> tuple[str, int]:
        fields = line.split()
        if len(fields) < 4 or fields[3] not in ("0", "1"):
            rule = "each line must be folder, file, number and label 0 or 1"
            raise self.source.wrong(listed, rule, line[:80], f"line {number}")
        name = PurePosixPath(fields[0], fields[1])
        if name.is_absolute() or ".." in name.parts:
            raise self.source.wrong(listed, "images must lie within the folder", str(name), f"line {number}")
        return str(name), int(fields[3])

    @cached_property
    def parts(self) -> dict[str, Rows]:
        count = len(self.drawings.labels)
        order = generator("lra_pathfinder", "split").permutation(count)
        train, validation, test = np.split(order, [count * 8 // 10, count * 9 // 10])
        chosen = {"train": train, "validation": validation, "test": test}
        return {split: Part(self.drawings, np.sort(rows)) for split, rows in chosen.items()}

    def describe(self, seq_len: int) -> dict[str, Any]:
        images = described_folder(self.drawings.files, self.source)
        labels = digest([self.drawings.labels.tobytes()])
        return {
            "level": self.level,
            "images": images,
            "rows": self.counts(),
            "digest": digest([images["sha256"], labels]),
        }


def _lines(listed: Path, source: Source) -> list[str]:
    """The lines of a metadata file."""
    try:
        raw = listed.read_bytes()
        if not raw.startswith(ARRAY):
            return raw.decode().splitlines()
        found = np.load(listed, allow_pickle=False)
    except OSError as error:
        raise source.unreadable(error) from None
    except ValueError as error:  # no UTF-8; an array of objects, which only pickles can hold; a damaged array
        raise source.wrong(listed, "the file must be text, or an array of text", " ".join(str(error).split())) from None
    if found.dtype.kind == "S":
        found = np.char.decode(found, errors="replace")
    return [" ".join(map(str, np.atleast_1d(line))) for line in np.atleast_1d(found)]
