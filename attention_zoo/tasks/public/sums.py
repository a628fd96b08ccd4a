"""Sizes and checksums: what a result's row says about the files it was made from.

Files are read in blocks, never whole, and each once in a process as long as its size and time stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attention_zoo.tasks.public.source import Source

Kind = Literal["sha256", "md5"]


def checksum(path: Path, source: Source, kind: Kind = "sha256") -> str:
    """Hexadecimal digits that name a file's content."""
    try:
        about = path.stat()
        return _checksum(path, about.st_size, about.st_mtime_ns, kind)
    except OSError as error:
        raise source.unreadable(error) from None


@lru_cache(maxsize=2**17)
def _checksum(path: Path, size: int, modified: int, kind: Kind) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _maker(kind)).hexdigest()


def _maker(kind: Kind) -> Callable[[], Any]:
    return lambda: hashlib.new(kind, usedforsecurity=False)


def described(files: Mapping[str, Path], source: Source) -> dict[str, Any]:
    """Bytes and SHA-256 of each file, by its name."""
    found = {name: checksum(path, source) for name, path in files.items()}
    return {name: {"bytes": path.stat().st_size, "sha256": found[name]} for name, path in files.items()}


def described_folder(files: Iterable[tuple[str, Path, int]], source: Source) -> dict[str, Any]:
    """Number, bytes and one SHA-256 of many files: that of the list `sha256sum` prints of them, sorted by name.

    Args:
        files: name, path and size of each.
    """
    count = total = 0
    listing = hashlib.sha256()
    for name, path, size in sorted(files):
        count, total = count + 1, total + size
        listing.update(f"{checksum(path, source)}  {name}\n".encode(errors="surrogateescape"))
    return {"files": count, "bytes": total, "sha256": listing.hexdigest()}


def checksum_of(data: np.ndarray, kind: Kind = "sha256") -> str:
    """The same of bytes that are in memory."""
    return str(hashlib.new(kind, np.ascontiguousarray(data).data, usedforsecurity=False).hexdigest())
