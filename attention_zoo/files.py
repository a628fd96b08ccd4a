"""Files that are either old or new, never half: every write of this project goes through here."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write beside the target, then rename over it; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    # like open(), and unlike mkstemp, with the permissions that the user's umask allows: results are there to be shared
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """One JSON document, atomically. NaN and infinity are refused: they are no JSON."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Add one line. A single O_APPEND write: concurrent writers do not mix lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut off by a crash is left out."""
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not JSON") from None
