"""Which bytes a text task is made of: files that are listed, picked, split by their own names, and named by a digest.

A folder, a single file, or an archive (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz, .zip, .whl), whose members are read in
memory and never written anywhere: what an archive's names point to outside of it cannot be reached. Files are sorted by
relative path. Which of them are for training, validation or test is a function of the path, so a split never moves.

A pinned archive is a corpus that is the same for every Python and every machine: the standard library is not.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import os
import stat
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import numpy as np

from attention_zoo.rules import shown
from attention_zoo.tasks.task import digest

SKIPPED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test", "pydoc_data"}
)
"""Folders of installed source that are left out: other people's packages, tests, whose long literal tables are no prose
of code, and the help texts, which are one file of three quarters of a megabyte."""
OWN_SKIPPED = ("__pycache__",)
"""Folders of one's own text that are left out: what Python made there."""
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIPS = (".zip", ".whl")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
"""Endings of what is no text and not read as an archive either."""
DAMAGES = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What the libraries raise for archives that are cut off, changed or encrypted; OSErrors beside, without a file."""
BLOCK = 2**20

File = tuple[str, bytes]
"""Relative path and content."""


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


class Entry(NamedTuple):
    """A file that may be read: its relative path, its size, and its first bytes (all for None)."""

    name: str
    size: int
    read: Callable[[int | None], bytes]


def existing(path: str) -> Path:
    """The file or folder that `task.path` names; a ValueError for none, or what is neither (a pipe, a device)."""
    root = Path(os.path.expanduser(path))
    try:
        there = bool(path) and (root.is_file() or root.is_dir())
    except OSError:  # a name longer than the system's, a folder on the way that may not be looked into
        there = False
    if not there:
        raise ValueError(f"task.path must be an existing file or folder, got {shown(path)}")
    if root.is_file() and root.name.lower().endswith(PACKED) and not root.name.lower().endswith(TARS):
        raise ValueError(f"task.path must be text, or one of {', '.join(TARS + ZIPS)}, got {shown(path)}: unpack it")
    return root


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


@contextmanager
def _entries(root: Path, suffix: str | None, skip: Collection[str], hidden: bool) -> Iterator[list[Entry]]:
    """What may be read below a folder or in an archive, in the order in which reading is cheap."""
    if root.is_dir():
        yield [Entry(name, size, partial(_read, path)) for name, path, size in list_files(root, suffix, skip, hidden)]
        return
    try:
        with zipfile.ZipFile(root) if root.name.lower().endswith(ZIPS) else tarfile.open(root) as archive:
            members = _zipped(archive) if isinstance(archive, zipfile.ZipFile) else _tarred(archive)
            wanted = [each for each in members if each.size and _wanted(each.name, suffix, skip, hidden)]
            yield list({each.name: each for each in wanted}.values())  # of a name that comes twice, the last counts
    except (OSError, *DAMAGES) as error:
        if isinstance(error, OSError) and error.filename is not None:
            _refuse(error)
        raise ValueError(f"task.path: {root} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _wanted(name: str, suffix: str | None, skip: Collection[str], hidden: bool) -> bool:
    *folders, file = name.split("/")
    seen = hidden or not any(part.startswith(".") for part in (*folders, file))
    return seen and not any(folder in skip for folder in folders) and (not suffix or file.endswith(suffix))


def _zipped(archive: zipfile.ZipFile) -> list[Entry]:
    def read(name: str, most: int | None) -> bytes:
        with archive.open(name) as file:
            return _first(file, most)

    return [Entry(each.filename, each.file_size, partial(read, each.filename)) for each in archive.infolist()
            if not each.is_dir()]  # fmt: skip


def _tarred(archive: tarfile.TarFile) -> list[Entry]:
    def read(member: tarfile.TarInfo, most: int | None) -> bytes:
        file = archive.extractfile(member)
        return b"" if file is None else _first(file, most)

    return [Entry(os.path.normpath(each.name), each.size, partial(read, each)) for each in archive if each.isreg()]


def _first(file: IO[bytes], most: int | None) -> bytes:
    return file.read() if most is None else file.read(most)


def read_files(
    root: Path,
    suffix: str | None,
    max_bytes: int | None,
    skip: tuple[str, ...] = OWN_SKIPPED,
    hidden: bool = False,
) -> tuple[File, ...]:
    """Relative path and content of a file, or of the files of a folder or archive, sorted by path.

    Args:
        root: a file, a folder or an archive.
        suffix: ending of the files to take from a folder or archive; None takes all.
        max_bytes: about how much to read at most. Files are then picked by the hash of their relative path, so that
            the pick is a fair sample and not the start of the alphabet. No more than that is read.
        skip, hidden: see `list_files`.

    Raises:
        ValueError: for a file that cannot be read, in one line.
    """
    if root.is_file() and not root.name.lower().endswith(TARS + ZIPS):
        return ((root.name, _read(root, max_bytes)),)
    with _entries(root, suffix, skip, hidden) as entries:
        picked: set[str] = set()
        total = 0
        for entry in sorted(entries, key=lambda entry: _hash(entry.name, "pick")):
            if max_bytes is None or not picked or total + entry.size <= max_bytes:
                picked.add(entry.name)
                total += entry.size
        return tuple(sorted((entry.name, entry.read(max_bytes)) for entry in entries if entry.name in picked))


def standard_library(max_bytes: int) -> np.ndarray:
    """About so many bytes of the source of Python's standard library, which every machine has."""
    files = read_files(Path(sysconfig.get_path("stdlib")), ".py", max_bytes, tuple(sorted(SKIPPED)))
    return join_files(files).data


def check_digest(root: Path, expected: str, suffix: str | None, skip: Collection[str], hidden: bool) -> None:
    """Refuse a text other than the one that was named.

    Of a file or archive it is the SHA-256 of the file itself. Of a folder it is that of the sorted lines
    "<SHA-256 of the content>  <relative path>", as `sha256sum` prints them.

    Raises:
        ValueError: where it differs, with the one that was found.
    """
    if root.is_dir():
        whole = hashlib.sha256()
        for name, path, _ in list_files(root, suffix, skip, hidden):
            whole.update(f"{_sha256(path)}  {name}\n".encode(errors="surrogateescape"))
        found = whole.hexdigest()
    else:
        found = _sha256(root)
    if found != expected.lower():
        raise ValueError(f"task.sha256 must be that of the text, {found} for {root}, got {shown(expected)}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        _refuse(error)


def split_files(files: Sequence[File], validation: float, test: float = 0.0) -> tuple[list[File], ...]:
    """Files for training, for validation and for test, by the hash of the path.

    Each part has at least one file. Where there are fewer files than parts, each file is cut: its last parts are for
    validation and test. A share of 0 leaves its part empty.
    """
    shares = (test, validation)
    least = [int(share > 0) for share in shares]
    if len(files) <= sum(least):
        return _cut_files(files, validation, test)
    order = sorted(files, key=lambda entry: _hash(entry[0], "split"))
    first, second = (sum(_hash(name, "split") < bound for name, _ in order) for bound in (test, test + validation))
    first = min(max(first, least[0]), len(order) - 1 - least[1]) if test else 0
    second = min(max(second, first + least[1]), len(order) - 1)
    return sorted(order[second:]), sorted(order[first:second]), sorted(order[:first])


def _cut_files(files: Sequence[File], validation: float, test: float) -> tuple[list[File], ...]:
    parts: tuple[list[File], ...] = ([], [], [])
    for name, raw in files:
        last = len(raw) - math.ceil(len(raw) * test)
        cut = max(0, last - math.ceil(len(raw) * validation))
        for part, piece in zip(parts, (raw[:cut], raw[cut:last], raw[last:])):
            if piece:
                part.append((name, piece))
    return parts


def _hash(name: str, use: str) -> float:
    """A number in [0, 1) that depends on both arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{use}:{name}".encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def join_files(contents: Sequence[File]) -> Corpus:
    """The bytes of some files, one after another."""
    data = np.frombuffer(b"".join(raw for _, raw in contents), dtype=np.uint8)
    ends = np.cumsum([len(raw) for _, raw in contents], dtype=np.int64)
    return Corpus(data, ends, digest([part for entry in contents for part in entry]))
