"""Where rows come from: JSONL files, single rows, and folders of runs; several of them stand side by side by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_json, read_jsonl
from attention_zoo.report.rows import FROM, LeftOut, Rows, check, fresh, unique
from attention_zoo.results.row import Row
from attention_zoo.rules import shown

TABLE, RESULT = "results.jsonl", "result.json"
KEPT = ("cells", "peers", "budgets")
"""Folders of single rows beside a benchmark's table."""
NESTED = (*KEPT, "training")
"""Folders whose rows belong to the folder around them."""


def read(results: Any) -> Rows:
    """The rows of one or several files and folders.

    Of a result that stands twice in one file the last row counts; that of a run's own folder counts more than that of
    a table around it. Rows of several files carry the name of theirs under "from", unless all is of one.

    Args:
        results: a path or several: JSONL files, a row's own `.json`, or folders, of which every results.jsonl,
            result.json, cells/*.json, peers/*.json and budgets/*.json beneath is taken.

    Returns:
        the rows that may be drawn; `left_out` says what else there was.

    Raises:
        ValueError: for a path with nothing behind it, or no row at all that may be drawn, in one line.
    """
    one = isinstance(results, str | os.PathLike)
    given: list[Any] = [results] if one else list(results) if isinstance(results, Iterable) else [results]
    if not given or not all(isinstance(each, str | os.PathLike) and str(each) for each in given):
        raise ValueError(f"results must be a path or a list of paths, got {shown(results, 60)}")
    files = dict.fromkeys(file for path in given for file in _files(Path(path)))
    placed: list[tuple[Path, list[Row]]] = []
    bad: list[LeftOut] = []
    for file in files:
        found, wrong = _rows(file)
        bad += wrong
        if found:  # what holds no row has no say in the names of the others
            placed.append((_home(file), found))
    names = _names(list(dict.fromkeys(home for home, _ in placed)))
    several = len(names) > 1
    good = [{**row, FROM: names[home]} if several else row for home, found in placed for row in found]
    if not good:
        first = f"; {bad[0]}" + (f", and {len(bad) - 1} more" if len(bad) > 1 else "") if bad else ""
        said = ", ".join(repr(str(path)) for path in given[:3]) or "nothing"
        raise ValueError(f"results must hold at least one row that can be drawn, got {said}{first}")
    return fresh(unique(good), bad)


def _files(path: Path) -> Iterator[Path]:
    """The files behind a path: tables first, since single rows are written as soon as they are there."""
    if path.is_dir():
        found = sorted(_beneath(path), key=lambda file: (file.name != TABLE, file))
        if not found:
            raise ValueError(
                f"results must name results, got {str(path)!r}, a folder without {TABLE}, {RESULT} or {KEPT[0]}/*.json"
            )
        yield from found
    elif path.exists():
        yield path
    else:
        raise ValueError(f"results must name JSONL files or folders of runs, got {str(path)!r}, which does not exist")


def _beneath(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            kept = Path(place).name in KEPT and name.endswith(".json") and not name.startswith(".")
            if kept or name in (TABLE, RESULT):
                yield Path(place) / name


def _home(file: Path) -> Path:
    """What a file's rows stand under: a run's row under the folder of all runs, a cell's under its benchmark."""
    file = file.resolve()
    if file.name == TABLE:
        return file.parent
    home = file.parent if file.parent.name in KEPT else file.parent.parent if file.name == RESULT else file
    return home.parent if home.name in NESTED else home


def _names(homes: list[Path]) -> dict[Path, str]:
    """What tells the places apart, as short as it may be."""
    if len(homes) < 2:
        return {home: home.name for home in homes}
    around = Path(os.path.commonpath(homes))
    return {home: home.name if home == around else home.relative_to(around).as_posix() for home in homes}


def _rows(file: Path) -> tuple[list[Row], list[LeftOut]]:
    lost: list[LeftOut] = []
    try:
        single = file.suffix == ".json"
        rows = [read_json(file)] if single else list(read_jsonl(file, lambda said: lost.append(_located(said, file))))
    except (Damaged, OSError) as error:
        return [], [_located(str(error), file)]
    if not rows and not lost:
        lost.append(LeftOut(str(file), "holds no rows"))
    good, bad = check(rows, str(file))
    return good, [*lost, *bad]


def _located(sentence: str, file: Path) -> LeftOut:
    """A sentence about a file, as where and what."""
    what = sentence.removeprefix(str(file)).removesuffix("; left out")
    line = re.match(r", (line \d+) ", what)
    return LeftOut(f"{file}, {line[1]}", what[line.end() :]) if line else LeftOut(str(file), what.strip(" :"))
