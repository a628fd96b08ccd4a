"""Rows that lie in a folder, one file each: looked at when they are read, written whatever lies in their place."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_json, remove_leftovers, write_row
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.results.check import wrong_to_keep
from attention_zoo.results.row import Row
from attention_zoo.rules import shown


def read_rows(folder: str | Path, kind: str, on_bad: Callable[[str], None]) -> list[Row]:
    """All rows of one kind that are kept in a folder, of whatever code.

    Args:
        folder: of files <id>.json.
        kind: "speed", "peer" or "budget".
        on_bad: told in one line about each file that holds no such row; it is left out.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(_checked(path, kind))
        except (Damaged, FileNotFoundError) as error:  # the latter: a link to nothing
            on_bad(f"{error}; left out")
    return found


def keep_row(path: str | Path, row: Row) -> None:
    """Write a row, also where something else has its name."""
    make_way(path)
    write_row(path, row)


def make_way(path: str | Path) -> None:
    """Give a folder that has the name of a row's file another one; nothing of somebody else's is deleted."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.aside"))


def clear_leftovers(folder: str | Path) -> None:
    """Remove temporary files of writers that were killed, here and one folder below; see `files.remove_leftovers`."""
    folder = Path(folder)
    remove_leftovers(folder)
    for inner in folder.iterdir() if folder.is_dir() else ():
        remove_leftovers(inner)


def output_folder(given: str) -> Path:
    """The folder of everything, as it is asked for.

    Raises:
        ValueError: for what no path can be.
    """
    if not given or "\0" in given:
        raise ValueError(f"output must be a path, got {given!r}")
    return Path(given)


def number(value: Any) -> bool:
    """Whether it is a finite number, and no larger than a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value.bit_length() < 1024 if isinstance(value, int) else math.isfinite(value)


def _checked(path: Path, kind: str) -> Row:
    row = read_json(path)
    wrong = wrong_to_keep(row, kind) or _misplaced(row, path.stem) or (_of_no_cell(row) if kind == "speed" else None)
    if wrong is not None:
        raise Damaged(f"{path} is no row of kind {kind}: {wrong}")
    return row


def _misplaced(row: Row, name: str) -> str | None:
    return None if row["id"] == name else f"id must be {name}, got {shown(row['id'])}"


def _of_no_cell(row: Row) -> str | None:
    """What tells that a row is of no cell that there could be, or of another one than it says."""
    try:
        SpeedCell(**row["config"])
    except (TypeError, ValueError) as error:
        return f"config: {' '.join(str(error).split()):.200}"
    for key, value in row["config"].items():
        if key not in ("options", "model") and (row.get(key) != value or type(row[key]) is not type(value)):
            return f"{key} must be that of its config, got {shown(row.get(key))}"
    return None
