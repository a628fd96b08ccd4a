"""Byte-level language modelling on real text that every machine has: the source of Python's standard library.

A token is a byte, the vocabulary is 256, and nothing is downloaded: training and validation read the standard library
in place, the held-out domain is the source of another installed package (torch, a dependency). Any other file or folder
works too (`path`). Files are sorted by relative path and hashed; whether one is for validation is a function of that
path, so the split never moves. Any bytes are text here; which folders are left out is said by `skip` and `hidden`.

Rows are streams: row b of a batch goes on in row b of the next, segment by segment, up to `span` segments of one
document; then the row takes the next document and is flagged `fresh`. That is what truncated backpropagation needs.

Deviations from file = document: neighbouring short files (sorted order, same split) are joined until they fill a span,
since most sources are shorter than a long row and would be lost. The end of a document that fills no whole segment is
cut off; where segments start moves at each epoch, so that no byte is always lost.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import stat
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import torch
from pydantic import Field

from attention_zoo.options import Positive, checked
from attention_zoo.options import Text as Words
from attention_zoo.rules import shown
from attention_zoo.tasks.task import Batch, Task, digest, generator

SKIPPED = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test"})
"""Folders of installed source that are left out: other people's packages, and tests, whose long literal tables are no
prose of code."""
OWN_SKIPPED = ("__pycache__",)
"""Folders of one's own text that are left out: what Python made there."""
Bytes = Annotated[int, Field(ge=1, le=2**62)]
Between = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, description="a share between 0 and 1")]


class Corpus(NamedTuple):
    """Bytes of some files.

    Fields:
        data: uint8, all files one after another.
        ends: where each file ends in `data`.
        digest: names paths and contents.
    """

    data: np.ndarray
    ends: np.ndarray
    digest: str


class Spans(NamedTuple):
    """The pieces that rows take one after another: [start, segments, slack], slack = how far it may be moved."""

    start: np.ndarray
    segments: np.ndarray
    slack: np.ndarray


def list_files(
    root: Path, suffix: str | None = None, skip: Collection[str] = OWN_SKIPPED, hidden: bool = False
) -> list[tuple[str, Path, int]]:
    """Relative path, path and size of every non-empty file below `root`, sorted.

    Args:
        root: a folder.
        suffix: ending of the files to list; None lists all.
        skip: names of folders that are left out.
        hidden: whether files and folders whose name begins with a dot count.

    Raises:
        ValueError: for a folder or file that cannot be read, in one line.
    """
    found = []
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if name not in skip and (hidden or not name.startswith("."))]
        for name in names:
            path = Path(folder, name)
            if (name.startswith(".") and not hidden) or (suffix and not name.endswith(suffix)):
                continue
            try:
                about = path.stat()
            except OSError as error:
                _refuse(error)
            if stat.S_ISREG(about.st_mode) and about.st_size:
                found.append((path.relative_to(root).as_posix(), path, about.st_size))
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"task.path: {error.filename} cannot be read: {error.strerror or error}") from None


def _read(path: Path, most: int | None) -> bytes:
    """The first `most` bytes of a file; all if None."""
    try:
        with path.open("rb") as file:
            return file.read() if most is None else file.read(most)
    except OSError as error:
        _refuse(error)


@lru_cache(maxsize=4)
def read_files(
    root: Path,
    suffix: str | None,
    max_bytes: int | None,
    skip: tuple[str, ...] = OWN_SKIPPED,
    hidden: bool = False,
) -> tuple[tuple[str, bytes], ...]:
    """Relative path and content of a file, or of the files of a folder, sorted by path.

    Args:
        root: a file or a folder.
        suffix: ending of the files to take from a folder; None takes all.
        max_bytes: about how much to read at most. Files are then picked by the hash of their relative path, so that
            the pick is a fair sample and not the start of the alphabet. No more than that is read.
        skip, hidden: see `list_files`.

    Raises:
        ValueError: for a file that cannot be read, in one line.
    """
    if root.is_file():
        return ((root.name, _read(root, max_bytes)),)
    files = list_files(root, suffix, skip, hidden)
    if max_bytes is not None:
        picked: list[tuple[str, Path, int]] = []
        total = 0
        for entry in sorted(files, key=lambda entry: _hash(entry[0], "pick")):
            if not picked or total + entry[2] <= max_bytes:
                picked.append(entry)
                total += entry[2]
        files = sorted(picked)
    return tuple((name, _read(path, max_bytes)) for name, path, _ in files)


def split_files(files: Sequence[tuple[str, bytes]], validation: float) -> tuple[list, list]:
    """Files for training and for validation, by the hash of the path; a single file gives its last part."""
    if len(files) == 1:
        name, raw = files[0]
        cut = len(raw) - math.ceil(len(raw) * validation)
        return [(name, raw[:cut])], [(name, raw[cut:])]
    held = {name for name, _ in files if _hash(name, "split") < validation}
    if not 0 < len(held) < len(files):
        held = {min((name for name, _ in files), key=lambda name: _hash(name, "split"), default="")}
    return [entry for entry in files if entry[0] not in held], [entry for entry in files if entry[0] in held]


def _hash(name: str, use: str) -> float:
    """A number in [0, 1) that depends on both arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{use}:{name}".encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def join_files(contents: Sequence[tuple[str, bytes]]) -> Corpus:
    """The bytes of some files, one after another."""
    data = np.frombuffer(b"".join(raw for _, raw in contents), dtype=np.uint8)
    ends = np.cumsum([len(raw) for _, raw in contents], dtype=np.int64)
    return Corpus(data, ends, digest([part for entry in contents for part in entry]))


def cut_spans(ends: np.ndarray, seq_len: int, span: int) -> Spans:
    """Join short files into documents, and cut documents into spans of at most `span` segments of `seq_len` tokens."""
    rows = []
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end - start <= span * seq_len and index + 1 < len(ends):
            continue  # too short by itself: goes on in the next file
        segments = (end - start - 1) // seq_len  # one byte more than a segment: the last token's target
        slack = (end - start - 1) - segments * seq_len
        for first in range(0, segments, span):
            rows.append((start + first * seq_len, min(span, segments - first), slack))
        start = end
    return Spans(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


class Text(Task):
    """Byte-level language modelling.

    Args:
        path: a file or folder of your own text; None reads the source of Python's standard library.
        suffix: ending of the files to take from a folder; None takes all (the standard library: always ".py").
        skip: names of folders within `path` that are left out. None: of your own text what Python made there
            (`__pycache__`) and nothing else; of the standard library installed packages and tests, too (`SKIPPED`,
            which always holds for the held-out package).
        hidden: whether files and folders whose name begins with a dot are read.
        held_out: name of an installed package whose source is the held-out domain; None for none.
        max_bytes: about how much to read for training and validation together; None reads all.
        held_out_bytes: the same for the held-out domain.
        validation: share of the files (of the bytes, where there is one file) kept for validation.
        span: segments that a row follows one document, at most: what a carried state can reach back over.
        evaluation_rows: documents of each evaluation set, each followed for `span` segments.

    Raises:
        ValueError: for a missing path or package, naming it.
    """

    name = "text"
    vocab = 256
    streams = True
    metric, better = "bits_per_byte", "lower"

    @checked
    def __init__(
        self,
        *,
        path: Words | None = None,
        suffix: Words | None = None,
        skip: Sequence[Words] | None = None,
        hidden: bool = False,
        held_out: Words | None = "torch",
        max_bytes: Bytes | None = 8_000_000,
        held_out_bytes: Bytes | None = 1_000_000,
        validation: Between = 0.1,
        span: Positive = 4,
        evaluation_rows: Positive = 16,
    ):
        self.suffix, self.hidden = suffix, hidden
        if path is None:
            self.root, self.suffix = Path(sysconfig.get_path("stdlib")), ".py"
        else:
            self.root = existing(path)
        default = SKIPPED if path is None else OWN_SKIPPED
        self.skip = tuple(sorted(default if skip is None else skip))
        self.held_root = None if held_out is None else _package(held_out)
        self.source = path or "standard library"
        self.held_out, self.max_bytes, self.held_out_bytes = held_out, max_bytes, held_out_bytes
        self.validation, self.span, self.evaluation_rows = validation, span, evaluation_rows

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """Training and validation bytes, read at the first use."""
        files = read_files(self.root, self.suffix, self.max_bytes, self.skip, self.hidden)
        if not any(raw for _, raw in files):
            ending = f" ending in {self.suffix}" if self.suffix else ""
            raise ValueError(f"task.path={self.root} holds no non-empty file{ending}")
        train, validation = split_files(files, self.validation)
        return join_files(train), join_files(validation)

    @cached_property
    def held(self) -> Corpus | None:
        """Bytes of the held-out domain."""
        if self.held_root is None:
            return None
        return join_files(read_files(self.held_root, ".py", self.held_out_bytes, tuple(sorted(SKIPPED))))

    def check(self, seq_len: int) -> None:
        for name, corpus in zip(("training", "validation"), self.corpora):
            self._spans(corpus, seq_len, name)

    def _spans(self, corpus: Corpus, seq_len: int, name: str) -> Spans:
        spans = cut_spans(corpus.ends, seq_len, self.span)
        if not len(spans.start):
            raise ValueError(
                f"seq_len must be smaller than a document, got {seq_len}: {self.source} has {len(corpus.data)} bytes "
                f"for {name}; give a smaller seq_len or more text"
            )
        return spans

    def describe(self, seq_len: int) -> dict[str, Any]:
        train, validation = self.corpora
        held = self.held
        found: dict[str, Any] = {
            "source": self.source,
            "train_bytes": len(train.data),
            "train_files": len(train.ends),
            "validation_bytes": len(validation.data),
            "validation_files": len(validation.ends),
        }
        if held is not None:
            found |= {"held_out": self.held_out, "held_out_bytes": len(held.data), "held_out_files": len(held.ends)}
        return found | {"digest": digest([c.digest for c in (train, validation, held) if c is not None])}

    def train_batches(self, batch_size: int, seq_len: int, seed: int) -> TextBatches:
        train = self.corpora[0]
        return TextBatches(train.data, self._spans(train, seq_len, "training"), batch_size, seq_len, seed)

    def evaluation_sets(self, batch_size: int, seq_len: int) -> dict[str, TextSet]:
        corpora = {"validation": self.corpora[1], "held_out": self.held}
        return {
            name: TextSet(corpus.data, self._spans(corpus, seq_len, name), batch_size, seq_len, self.evaluation_rows)
            for name, corpus in corpora.items()
            if corpus is not None
        }

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"bits_per_byte": loss / math.log(2), "loss": loss, "accuracy": accuracy}


def existing(path: str) -> Path:
    """The file or folder that `task.path` names; a ValueError for none, or what is neither (a pipe, a device)."""
    root = Path(os.path.expanduser(path))
    try:
        there = bool(path) and (root.is_file() or root.is_dir())
    except OSError:  # a name longer than the system's, a folder on the way that may not be looked into
        there = False
    if not there:
        raise ValueError(f"task.path must be an existing file or folder, got {shown(path)}")
    return root


def _package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ValueError, ImportError):  # a module that runs without a file
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"task.held_out must name an installed package that is a folder of source, got {name!r}")
    return Path(spec.submodule_search_locations[0])


def _segment(data: np.ndarray, start: np.ndarray, seq_len: int, fresh: np.ndarray) -> Batch:
    window = torch.from_numpy(data[start[:, None] + np.arange(seq_len + 1)]).long()
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None, torch.from_numpy(fresh))


class TextBatches:
    """Training streams: each epoch takes every span once, in an order drawn from (seed, epoch)."""

    def __init__(self, data: np.ndarray, spans: Spans, batch_size: int, seq_len: int, seed: int):
        self.data, self.spans, self.seq_len, self.seed = data, spans, seq_len, seed
        self.epoch, self.taken = -1, len(spans.start)  # the first span asked for opens epoch 0
        self.order = self.moved = np.zeros(0, dtype=np.int64)
        self.at = np.zeros(batch_size, dtype=np.int64)  # first byte of each row's next segment
        self.left = np.zeros(batch_size, dtype=np.int64)  # segments left in each row's span

    def __iter__(self) -> TextBatches:
        return self

    def _open(self, epoch: int) -> None:
        random = generator("text", self.seed, epoch)
        self.epoch, self.order = epoch, random.permutation(len(self.spans.start))
        self.moved = np.floor(random.random(len(self.order)) * (self.spans.slack + 1)).astype(np.int64)

    def _take(self, row: int) -> None:
        if self.taken == len(self.spans.start):
            self._open(self.epoch + 1)
            self.taken = 0
        index = self.order[self.taken]
        self.taken += 1
        self.at[row] = self.spans.start[index] + self.moved[index]
        self.left[row] = self.spans.segments[index]

    def __next__(self) -> Batch:
        fresh = self.left == 0
        for row in np.flatnonzero(fresh).tolist():
            self._take(row)
        batch = _segment(self.data, self.at, self.seq_len, fresh)
        self.at += self.seq_len
        self.left -= 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "taken": int(self.taken),
            "at": self.at.tolist(),
            "left": self.left.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["epoch"] >= 0:
            self._open(state["epoch"])
        self.taken = state["taken"]
        self.at = np.array(state["at"], dtype=np.int64)
        self.left = np.array(state["left"], dtype=np.int64)


class TextSet:
    """Evaluation streams: `rows` spans spread evenly over the text, each started afresh and followed to its end."""

    def __init__(self, data: np.ndarray, spans: Spans, batch_size: int, seq_len: int, rows: int):
        longest = np.flatnonzero(spans.segments == spans.segments.max())  # rows of a batch end together
        picked = longest[np.unique(np.linspace(0, len(longest) - 1, min(rows, len(longest))).round().astype(int))]
        self.data, self.seq_len, self.batch_size = data, seq_len, batch_size
        self.start, self.segments = spans.start[picked], int(spans.segments.max())

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.start), self.batch_size):
            start = self.start[first : first + self.batch_size]
            for segment in range(self.segments):
                fresh = np.full(len(start), segment == 0)
                yield _segment(self.data, start + segment * self.seq_len, self.seq_len, fresh)
