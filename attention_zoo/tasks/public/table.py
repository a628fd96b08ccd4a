"""A file of lines with fields between tabs, larger than memory: where each field lies, found once, is all that is kept.

No quoting: a tab parts fields wherever it stands, a line feed ends a line (a carriage return before it is dropped).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attention_zoo.tasks.public.source import Source
from attention_zoo.tasks.public.streams import mapped

TAB, LINE, RETURN = 9, 10, 13
BLOCK = 2**26


class Table:
    """The fields of a file.

    Args:
        columns: what each field of a line is called.
        header: whether the first line holds the columns' names.

    Raises:
        ValueError: for a line with more or fewer fields, or another header, naming file and line.
    """

    def __init__(self, path: Path, columns: Sequence[str], source: Source, *, header: bool):
        self.path, self.columns, self.source, self.header = path, list(columns), source, header
        if not path.is_file():
            raise source.missing(path)
        self.data = mapped(path, source)
        ends, kinds = _marks(self.data)
        self._check(kinds)
        # [line, column]: a field lies between the mark before it and its own
        self.ends = ends.reshape(-1, len(columns))
        self.starts = np.concatenate([[0], ends[:-1] + 1]).reshape(self.ends.shape) if len(ends) else self.ends
        if header:
            names = (
                [self._text(0, column).decode(errors="replace") for column in range(len(columns))]
                if len(self.ends)
                else []
            )
            if names != self.columns:
                raise source.wrong(path, f"the header must be {self.columns}", names, "line 1")
            self.starts, self.ends = self.starts[1:], self.ends[1:]

    def __len__(self) -> int:
        return len(self.ends)

    def _check(self, kinds: np.ndarray) -> None:
        wanted = len(self.columns)
        last = np.flatnonzero(kinds == LINE)
        fields = np.diff(last, prepend=-1)
        odd = np.flatnonzero(fields != wanted)
        if len(odd):
            rule = f"a line must have {wanted} fields between tabs ({', '.join(self.columns)})"
            raise self.source.wrong(self.path, rule, int(fields[odd[0]]), f"line {int(odd[0]) + 1}")

    def _text(self, row: int, column: int) -> bytes:
        return self.data[self.starts[row, column] : self.ends[row, column]].tobytes().removesuffix(b"\r")

    def field(self, row: int, column: str, most: int | None = None) -> bytes:
        """One field's bytes, or the first `most` of them."""
        at = self.columns.index(column)
        if most is None:
            return self._text(row, at)
        start = self.starts[row, at]
        end = min(self.ends[row, at], start + most + 1)  # one more: it may be a carriage return
        return self.data[start:end].tobytes().removesuffix(b"\r")[:most]

    def sizes(self, column: str) -> np.ndarray:
        """[N]: bytes of each line's field."""
        at = self.columns.index(column)
        start, end = self.starts[:, at], self.ends[:, at]
        returned = (end > start) & (np.asarray(self.data[np.maximum(end - 1, 0)]) == RETURN)
        return end - start - returned

    def labels(self, column: str, words: Sequence[bytes]) -> np.ndarray:
        """[N]: the place of each line's field among the words that it may be."""
        numbers = {word: number for number, word in enumerate(words)}
        found = np.empty(len(self), np.int64)
        for row in range(len(self)):
            text = self.field(row, column)
            number = numbers.get(text)
            if number is None:
                rule = f"{column} must be one of {', '.join(word.decode() for word in words)}"
                raise self.source.wrong(self.path, rule, text[:40].decode(errors="replace"), self.line(row))
            found[row] = number
        return found

    def line(self, row: int) -> str:
        """Where a row stands, for errors."""
        return f"line {row + 1 + self.header}"


def _marks(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where fields end, and whether by a tab or by the end of the line; a last line need not be ended."""
    found = []
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        found.append(np.flatnonzero((block == TAB) | (block == LINE)) + start)
    ends = np.concatenate(found) if found else np.zeros(0, np.int64)
    kinds = np.asarray(data[ends])
    if len(data) and data[-1] != LINE:
        ends, kinds = np.append(ends, len(data)), np.append(kinds, LINE)
    return ends, kinds
