"""Where rows of advice come from: each keeps the path of its file, and the day and commit of its last change."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import attention_zoo
from attention_zoo.report import sources
from attention_zoo.report.rows import FROM, Rows, unique
from attention_zoo.results.row import Row
from attention_zoo.rules import shown

COMMITTED = Path(attention_zoo.__file__).parents[1] / "experiments" / "results"
"""The rows of a clone."""
GIT_S = 10.0


def rows_of(results: Any) -> Rows:
    """All rows, each with the path of its table, or of the folder of runs that it is beneath, under "from".

    Args:
        results: a path or a list of paths, files or folders; None: those that a clone holds.

    Raises:
        ValueError: for a path with nothing behind it, or where nothing is given and this is no clone.
    """
    if results is None:
        if not COMMITTED.is_dir():
            raise ValueError("results must name files or folders of results: this installation is no clone with rows")
        results = sorted(COMMITTED.rglob(sources.TABLE))
    given = [results] if isinstance(results, str | Path) else list(results) if isinstance(results, Iterable) else []
    if not given or not all(isinstance(each, str | Path) and str(each) for each in given):
        raise ValueError(f"results must be a path or a list of paths, got {shown(results, 60)}")
    found, left_out, replaced = list[Row](), [], 0
    for path in dict.fromkeys(part for each in given for part in _parts(Path(each))):
        read = sources.read([path])
        left_out += read.left_out
        replaced += read.replaced
        home = _named(path)
        found += [{**row, FROM: f"{home}/{row[FROM]}" if row.get(FROM) else home} for row in read]
    return Rows(unique(found), left_out, replaced)


def _parts(path: Path) -> list[Path]:
    """The tables beneath a folder, which hold what lies beside them; the folder itself where it has none."""
    tables = sorted(path.rglob(sources.TABLE)) if path.is_dir() else []
    return tables or [path]


def _named(path: Path) -> str:
    """As short as it leads there from here, or from the clone."""
    for base in (Path.cwd(), COMMITTED.parents[1]):
        if path.resolve().is_relative_to(base.resolve()):
            return path.resolve().relative_to(base.resolve()).as_posix()
    return path.as_posix()


@cache
def committed(file: str) -> str:
    """ "file last changed 2026-11-29, commit 4958d69" of a file that git knows; "" of others."""
    for base in (Path.cwd(), COMMITTED.parents[1]):
        if not (base / file).exists():
            continue
        asked = ["git", "-C", str(base), "log", "-1", "--format=file last changed %cs, commit %h", "--", file]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=GIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()
    return ""
