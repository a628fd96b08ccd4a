"""What of a result row is no single figure: tables over positions and distances, and pictures of patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Columns and rows of numbers or words."""

    columns: list[str]
    data: list[list[Any]]


def tables(row: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a row by name: of a training its loss by position, its accuracy by each of the groups that the task
    tells apart (distance, number of pairs, ...), its curves."""
    found = {}
    if row.get("loss_by_position"):
        found["tables/loss_by_position"] = Table(["position", "loss"], row["loss_by_position"])
    for name, groups in (row.get("by_group") or {}).items():
        found[f"tables/accuracy_by_{name}"] = Table([name, "accuracy", "loss", "answers"], groups)
    for name, key in (("loss", "curve"), (str(row.get("metric")), "quality_curve")):
        if row.get(key):
            found[f"tables/{name}_by_step"] = Table(["step", name], row[key])
    return found


def heat_map(values: list[list[float]], *, title: str, across: str = "key", down: str = "query") -> dict[str, Any]:
    """A plotly figure of a matrix, as plain values: down runs from the top, as in a mask."""
    axes = {"xaxis": {"title": {"text": across}}, "yaxis": {"title": {"text": down}, "autorange": "reversed"}}
    heat = {"type": "heatmap", "z": values, "colorscale": "Blues", "showscale": True}
    return {"data": [heat], "layout": {"title": {"text": title}, "width": 520, "height": 520, **axes}}


def pictures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each portrait row that has one: which token sees which, by name."""
    return {
        f"patterns/{row['backend']}": heat_map(
            [[int(digit) for digit in line] for line in row["pairs"]], title=f"What each token sees: {row['backend']}"
        )
        for row in rows
        if row["kind"] == "portrait" and row.get("pairs")
    }
