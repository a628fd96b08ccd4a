"""Files that are either old or new, never half: every name, write and read of this project goes through here."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

NAME_LIMIT = 80
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


class Damaged(ValueError):
    """A file that is not what it should be. One line: which file, and what is wrong with it."""


def safe_name(text: str, limit: int = NAME_LIMIT) -> str:
    """One path component out of any text: where names of people and configs become names of files.

    Letters, digits and `._=+,-` stay. Where anything had to be changed or cut, a digest of the whole is added, so that
    two texts never share a name.

    Args:
        text: anything, path separators, NUL and lone surrogates included.
        limit: characters at most.
    """
    kept = re.sub(r"[^A-Za-z0-9._=+,-]+", "-", text).lstrip(".-")
    if kept == text and 0 < len(kept) <= limit:
        return kept
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{kept[: limit - len(digest) - 1]}-{digest}".lstrip("-")


def plain(value: Any) -> Any:
    """The same as JSON can hold it, whatever it is, so that a row can always be written.

    NaN and infinity become the words "nan", "inf" and "-inf"; what is neither number, text, list nor mapping becomes
    text; so do lone surrogates, escaped.
    """
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)  # Python writes no longer ones out in digits
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {_text(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return _text(value)


def _text(value: Any) -> str:
    return str(value).encode(errors="backslashreplace").decode()


def write_atomic(path: str | Path, content: str | bytes, *, before: str | Path | None = None) -> Path:
    """Write beside the target, then rename over it; parent folders are made.

    Args:
        before: a name beside it under which what the target held is kept; None: it goes.

    Raises:
        OSError: naming the target, which then holds what it held before: a full disk, a folder in its place, ...
    """
    path = Path(path)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    # like open(), and unlike mkstemp, with the permissions that the user's umask allows: results are there to be shared
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            if before is not None and path.is_file():
                os.replace(path, before)  # killed here, the file is whole under that name
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """One JSON document, atomically. NaN and infinity are refused: they are no JSON."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_row(path: str | Path, row: Mapping[str, Any]) -> Path:
    """A result row, atomically, made `plain` first: whatever it holds, it is not lost."""
    return write_json(path, plain(row))


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one line. A single O_APPEND write: concurrent writers do not mix lines.

    A line that an earlier writer could not finish (killed, full disk) is ended first, so that nothing is glued to it.

    Raises:
        OSError: naming the file, where not all bytes could be written.
    """
    path = Path(path)
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:  # a short write is how a nearly full disk answers; the next try says why
                line = line[os.write(handle, line) :]
        finally:
            os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error


def read_json(path: str | Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        Damaged: for anything else in its place, naming the file and what is wrong.
        FileNotFoundError: if there is nothing.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe has no end, a device neither
        raise Damaged(f"{path} cannot be read: it is no regular file")
    return _object(_bytes(path), str(path))


def read_jsonl(path: str | Path, on_bad: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Lines that are no JSON object are left out.

    Args:
        on_bad: told about each such line in one sentence; but not about a last one that a crash cut off.

    Raises:
        Damaged: for something that is no file.
        FileNotFoundError: if there is nothing.
    """
    lines = _bytes(Path(path)).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _object(line, f"{path}, line {number}")
        except Damaged as error:
            if on_bad is not None and number < len(lines):
                on_bad(f"{error}; left out")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed. Only for who owns the folder (`locks.owning`)."""
    folder = Path(folder)
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Damaged(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _object(data: bytes, where: str) -> dict[str, Any]:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise Damaged(f"{where} is nested too deeply to be one of ours") from None
    except ValueError as error:  # no JSON, or no UTF-8
        wrong = "it is empty" if not data.strip() else " ".join(str(error).split())
        raise Damaged(f"{where} is not JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def _unwritable(path: Path, error: OSError) -> OSError:
    """The same error, about the file that was meant."""
    return OSError(error.errno, error.strerror or str(error), str(path))
