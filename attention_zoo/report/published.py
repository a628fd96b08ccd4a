"""Published tables beside ours, cell by cell, from rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from attention_zoo.report import groups, units
from attention_zoo.report.cells import Table
from attention_zoo.report.groups import Group
from attention_zoo.report.quality import value_words
from attention_zoo.results.row import Row

APART = " · "
"""Between what was published and what came out here."""


class Beside(NamedTuple):
    """One published table with ours beside.

    Fields:
        notes: the source, and in what ours differ.
    """

    title: str
    table: Table
    notes: list[str]


def published(rows: Iterable[Row]) -> list[Beside]:
    """Every published table among the rows, ours from the trainings among them: the mean over seeds, and its range."""
    rows = list(rows)
    trained = [row for row in rows if row["kind"] == "quality" and row["status"] == "ok"]
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "published":
            tables.setdefault((row["table"], row["source"]), []).append(row)
    return [_beside(title, source, cells, trained) for (title, source), cells in tables.items()]


def _beside(title: str, source: str, cells: list[Row], trained: list[Row]) -> Beside:
    lines = list(dict.fromkeys(cell["backend"] for cell in cells))
    columns = list(dict.fromkeys(cell["set"] for cell in cells))
    at = {(cell["backend"], cell["set"]): cell for cell in cells}
    ours = {id(cell): groups.gather(_ours(cell, trained)) for cell in cells}
    body = [[line, *(_words(at.get((line, column)), ours) for column in columns)] for line in lines]
    seeds = sorted({len({row["seed"] for row in many}) for found in ours.values() for many in found.values()})
    many = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]]))) if seeds else "no"
    said = [f"In each cell what was published{APART}ours: the mean over {many} seeds, and its range. Source: {source}."]
    if any(len(found) > 1 for found in ours.values()):
        said.append("Runs that differ in more than their seed stand apart, behind a semicolon.")
    return Beside(
        title, Table(["", *map(_column, columns)], body),
        [*said, *dict.fromkeys(cell["remark"] for cell in cells if cell.get("remark"))],
    )  # fmt: skip


def _column(name: str) -> str:
    """An evaluation set as a heading: "test@rounds_8" is of rounds 8."""
    return (name.partition("@")[2] or name).replace("_", " ")


def _ours(cell: Row, trained: list[Row]) -> list[Row]:
    return [
        row for row in trained
        if row["backend"] == cell["backend"] and row["task"] == cell["task"]
        and cell.get("seq_len") in (None, row["seq_len"])
    ]  # fmt: skip


def _words(cell: Row | None, ours: Mapping[int, Mapping[Group, list[Row]]]) -> str:
    if cell is None:
        return units.NONE
    found = ours[id(cell)]
    metric = cell.get("metric") or _metric([row for many in found.values() for row in many])
    said = [words for many in found.values() if (words := _mean(cell["set"], metric, many)) is not None]
    theirs = units.NONE if cell["value"] is None else value_words(cell["value"], metric)
    return f"{theirs}{APART}{'; '.join(said) or units.NONE}"


def _metric(many: list[Row]) -> str:
    """That which the trainings are judged by."""
    known = [str(row["metric"]) for row in many if row.get("metric")]
    return next(iter(known), "accuracy")


def _mean(name: str, metric: str, many: list[Row]) -> str | None:
    found = [(row.get("evaluations") or {}).get(name, {}).get(metric) for row in many]
    values = [float(value) for value in found if value is not None]
    if not values:
        return None
    mean = value_words(sum(values) / len(values), metric)
    if len(values) == 1:
        return mean
    low, high = (value_words(end(values), metric).removesuffix(" %") for end in (min, max))
    return f"{mean} ({low}–{high})"
