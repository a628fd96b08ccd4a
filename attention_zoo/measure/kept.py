"""Rows that lie in a folder, one file each: looked at when they are read, written whatever lies in their place."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_json, remove_leftovers, write_row
from attention_zoo.measure.cell import FIGURES, SpeedCell
from attention_zoo.measure.ends import STATUSES
from attention_zoo.rules import shown

Row = dict[str, Any]
WORDS = ("peak_method", "trace")
"""Figures that are no numbers."""
MEASURED = (
    "seconds", "seconds_min", "seconds_max", "cpu_seconds", "tokens_per_second", "matmul_flops_per_second",
    "floor_ratio",
)  # fmt: skip
"""Figures that are measured; all others are counted."""
LEAST, MOST = 1e-18, 1e18
"""No call takes less time, and no figure is larger."""
LIMITS = ("timeout_s", "memory_limit_bytes")
"""Under which a cell ran; None: without."""


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


def keep_row(path: str | Path, row: Mapping[str, Any]) -> None:
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
    wrong = _wrong(row, kind, path.stem) or (_wrong_speed(row) if kind == "speed" else None)
    if wrong is not None:
        raise Damaged(f"{path} is no row of kind {kind}: {wrong}")
    return row


def _wrong(row: Row, kind: str, name: str) -> str | None:
    for key, given in (("kind", kind), ("id", name)):
        if row.get(key) != given:
            return f"{key} must be {given}, got {shown(row.get(key))}"
    for key, wanted in (("backend", str), ("status", str), ("config", dict), ("environment", dict)):
        if not isinstance(row.get(key), wanted):
            return f"{key} must be {wanted.__name__}, got {shown(row.get(key))}"
    for key in ("cpu", "torch", "source"):
        if not isinstance(row["environment"].get(key), str | None):
            return f"environment.{key} must be text, got {shown(row['environment'][key])}"
    if row["status"] not in (*STATUSES, "missing"):
        return f"status must be one of {', '.join(STATUSES)}, got {shown(row['status'])}"
    if not isinstance(row.get("error"), str | None if row["status"] == "ok" else str):
        return f"error must be text, got {shown(row.get('error'))}"
    return None


def _wrong_speed(row: Row) -> str | None:
    try:
        SpeedCell(**row["config"])
    except (TypeError, ValueError) as error:
        return f"config: {' '.join(str(error).split()):.200}"
    for key, value in row["config"].items():
        if key != "options" and (row.get(key) != value or type(row[key]) is not type(value)):
            return f"{key} must be that of its config, got {shown(row.get(key))}"
    limits = row.get("limits")
    given = limits if isinstance(limits, dict) else {}
    if not all(key in given and (given[key] is None or number(given[key])) for key in LIMITS):
        return f"limits must tell {' and '.join(LIMITS)}, got {shown(limits)}"
    if not number(row.get("wall_seconds")):
        return f"wall_seconds must be a number, got {shown(row.get('wall_seconds'))}"
    for key in FIGURES:
        value = row.get(key)
        if value is None:
            continue
        if key in WORDS:
            fine, rule = isinstance(value, str), "text"
        else:
            fine, rule = number(value) and 0 <= value <= MOST, "a number of at least 0"
            if key not in MEASURED:
                fine, rule = fine and isinstance(value, int), "an integer of at least 0"
        if not fine:
            return f"{key} must be {rule}, got {shown(value)}"
    if row["status"] == "ok" and not (row.get("seconds") or 0) > LEAST:
        return f"seconds must be a number above 0, got {shown(row.get('seconds'))}"
    return None
