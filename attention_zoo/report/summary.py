"""The one table and the sentences that a reader takes away: derived from rows, shown in HTML, terminal and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable

from attention_zoo.files import write_atomic
from attention_zoo.measure.derived import Efficiency
from attention_zoo.overview import markdown
from attention_zoo.report import costs, quality, units
from attention_zoo.report import rows as results
from attention_zoo.report.costs import MEMORY, TIME, Series, Setting
from attention_zoo.report.quality import METRIC_WORDS, Task
from attention_zoo.report.rows import Row
from attention_zoo.report.units import NONE

PROSE = {"dense": "materialised full attention", "sdpa": "fused full attention"}
"""The baselines in a sentence, by kernel."""


@dataclass(frozen=True)
class Findings:
    """What the rows say, worked out once.

    Fields:
        setting: the setting with most speed rows; None without speed rows.
        series: its lines.
        length: the longest length at which all of them hold figures.
        tasks: all that was trained on.
    """

    setting: Setting | None
    series: list[Series]
    length: int | None
    tasks: list[Task]

    @staticmethod
    def of(rows: Iterable[Row]) -> Findings:
        rows = list(rows)
        found = costs.settings(rows)
        series = costs.lines(rows, found[0]) if found else []
        return Findings(found[0] if found else None, series, costs.longest_common_length(series), quality.tasks(rows))

    def baseline(self, kernel: str) -> Series | None:
        return next((each for each in self.series if (each.backend, each.kernel) == ("full", kernel)), None)

    def cheaper_from(self, series: Series, kernel: str, key: str) -> Efficiency | None:
        """Efficiency length against one baseline; None for a baseline itself, or where nothing can be compared."""
        baseline = self.baseline(kernel)
        return None if baseline is None or series.backend == "full" else costs.overtakes(series, baseline, key)


@dataclass(frozen=True)
class Summary:
    """A table with two header lines: groups of columns, then columns. The first column is the mechanism."""

    groups: list[tuple[str, list[str]]]
    names: list[str]
    cells: list[list[str]]


def summary(found: Findings) -> Summary:
    """One line per mechanism (per kernel and option set where several were measured)."""
    columns: list[tuple[str, str, list[str]]] = []
    lines: list[tuple[str, str, Series | None]] = [(each.label, each.backend, each) for each in found.series]
    trained = dict.fromkeys(each.backend for task in found.tasks for each in task.learnt)
    lines += [(name, name, None) for name in trained if name not in {backend for _, backend, _ in lines}]

    for task in found.tasks:
        learnt = {name: [each for each in task.learnt if each.backend == name] for name in trained}
        said = {name: " / ".join(each.words() for each in many) for name, many in learnt.items()}
        title = f"{task.name}: {METRIC_WORDS[task.metric]}"
        columns.append(("What it learnt", title, [said.get(name) or NONE for _, name, _ in lines]))
    if found.length is not None:
        columns += _at(f"At {found.length:,} tokens", lines, {line[0]: found.length for line in lines})
    if found.series:
        own = {label: max(series.values(TIME), default=None) for label, _, series in lines if series is not None}
        longest = "At its longest measured"
        columns.append((longest, "tokens", [units.count(own.get(label)) for label, *_ in lines]))
        columns += _at(longest, lines, own)
        for key, noun in ((TIME, "time"), (MEMORY, "memory")):
            exponents = [costs.growth(series, key) if series else None for *_, series in lines]
            columns.append(("Grows as length to the", noun, [units.fixed(g) for g in exponents]))
        for kernel, title in (("dense", "Cheaper than materialised from"), ("sdpa", "Cheaper than fused from")):
            for key, noun in ((TIME, "time"), (MEMORY, "memory")):
                crossings = [found.cheaper_from(series, kernel, key) if series else None for *_, series in lines]
                columns.append((title, noun, [costs.crossing_words(c) if c else NONE for c in crossings]))
    if trained:
        models = {row["backend"]: row for task in reversed(found.tasks) for each in task.learnt for row in each.rows}
        held = [models.get(name, {}) for _, name, _ in lines]
        columns.append(("Model", "parameters", [units.millions(row.get("parameters")) for row in held]))
        carries = {True: "yes", False: "no"}
        columns.append(("Model", "carries state", [carries.get(row.get("carries_state"), NONE) for row in held]))  # type: ignore[arg-type]

    groups: list[tuple[str, list[str]]] = []
    for group, name, _ in columns:
        if not groups or groups[-1][0] != group:
            groups.append((group, []))
        groups[-1][1].append(name)
    return Summary(groups, [label for label, *_ in lines], [list(cells) for cells in zip(*(c for *_, c in columns))])


def _at(group: str, lines: list[Any], lengths: dict[str, int | None]) -> Iterator[tuple[str, str, list[str]]]:
    for key, noun, words in ((TIME, "time", units.seconds), (MEMORY, "peak memory", units.size)):
        cells = []
        for label, _, series in lines:
            length = lengths.get(label)
            row = series.rows.get(length) if series and length else None
            value = series.values(key).get(length) if series and length else None
            cells.append(words(value) if value or row is None else results.status(row))
        yield group, noun, cells


def headline(found: Findings) -> list[str]:
    """The sentences on top of the report: figures that were measured, and no rank where none may be given."""
    said = []
    if found.length is not None:
        said += [sentence for key in (MEMORY, TIME) if (sentence := _cost_sentence(found, found.length, key))]
        said += _overtaking(found)
    for task in found.tasks:
        if not any(each.rows for each in task.learnt):
            continue
        obstacles = task.obstacles()
        figures = task.ranking() if not obstacles else _list(
            [f"{each.label} {each.words()}" for each in task.learnt if each.rows]
        )  # fmt: skip
        tail = f" ({'; '.join(obstacles)})" if obstacles else ""
        said.append(f"On {task.name} ({task.seq_len:,} tokens), {METRIC_WORDS[task.metric]}: {figures}{tail}.")
    return said


def _cost_sentence(found: Findings, length: int, key: str) -> str:
    """The cheapest mechanism beside both baselines, at the longest common length."""
    words, verb, best = (units.size, "peaks at", "least") if key == MEMORY else (units.seconds, "takes", "fastest")
    phase = (found.setting.phase if found.setting else "").replace("_", " + ")
    order = sorted(
        (each for each in found.series if not each.baseline and length in each.values(key)),
        key=lambda each: each.values(key)[length],
    )
    parts = []
    if order:
        rivals = [each.label for each in order[1:] if key == TIME and _overlap(order[0], each, length)]
        why = f"{best} of {len(order)}" if len(order) > 1 else "the only one measured"
        why = f"too close to call with {_list(rivals)}" if rivals else why
        parts.append(f"{words(order[0].values(key)[length])} with {order[0].label} ({why})")
    for kernel in ("sdpa", "dense"):
        baseline = found.baseline(kernel)
        if baseline is not None and length in baseline.values(key):
            parts.append(f"{words(baseline.values(key)[length])} with {PROSE[kernel]}")
    return f"At {length:,} tokens one {phase} call {verb} {_list(parts)}." if parts else ""


def _overtaking(found: Findings) -> list[str]:
    """Where the efficient mechanisms become faster than fused full attention."""
    faster, slower = [], []
    for series in found.series:
        crossing = found.cheaper_from(series, "sdpa", TIME)
        if crossing is None:
            continue
        if crossing.length is None:
            slower.append((series.label, f"{crossing.up_to:,}"))
        elif crossing.why == "from the shortest":
            faster.append(f"{series.label} at every length compared (from {crossing.length:,} tokens)")
        else:
            near = "about " if crossing.why == "interpolated" else "at most "
            faster.append(f"{series.label} from {near}{costs.crossing_words(crossing).removeprefix('≤ ')} tokens")
    said = f"Faster than fused full attention: {_list(faster)}" if faster else ""
    if slower:
        names, lengths = _list([label for label, _ in slower]), sorted({length for _, length in slower})
        rest = f"not up to {' or '.join(lengths)} tokens: {names}"
        said = f"{said}; {rest}" if said else f"Faster than fused full attention, {rest}"
    return [f"{said}."] if said else []


def _overlap(a: Series, b: Series, length: int) -> bool:
    """Whether the spreads of two timings touch, so that neither may be called faster."""
    one, two = a.rows[length], b.rows[length]
    bounds = [row.get(key) for row in (one, two) for key in ("seconds_min", "seconds_max")]
    if any(bound is None for bound in bounds):
        return False
    return min(one["seconds_max"], two["seconds_max"]) >= max(one["seconds_min"], two["seconds_min"])


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def rich_table(found: Findings) -> RichTable:
    """What fits a terminal of 80 columns: quality, cost at the common length, growth, overtaking fused attention."""
    headings, lines = _brief(found)
    table = RichTable(title_justify="left", header_style="bold", padding=(0, 1, 0, 0), box=box.SIMPLE)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column("\n".join(heading), justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(found: Findings) -> str:
    """The same for a README."""
    headings, lines = _brief(found)
    return markdown([headings[0], *(" ".join(heading) for heading in headings[1:])], lines)


def _brief(found: Findings) -> tuple[tuple[Any, ...], list[list[str]]]:
    """The columns that matter most, each heading in lines, and the cells."""
    whole = summary(found)
    flat = [(group, column) for group, columns in whole.groups for column in columns]
    short = {
        ("Grows as length to the", "time"): ("time ~", "length^"),
        ("Cheaper than fused from", "time"): ("faster than", "fused from"),
    }
    kept: list[tuple[int, tuple[str, ...]]] = []
    for number, (group, column) in enumerate(flat):
        if group == "What it learnt":
            kept.append((number, tuple(column.split(": "))))
        elif group.startswith("At ") and group.endswith(" tokens"):
            kept.append((number, (column, f"{group[0].lower()}{group[1:].removesuffix(' tokens')}")))
        elif (group, column) in short:
            kept.append((number, short[group, column]))
    lines = [[name, *(cells[number] for number, _ in kept)] for name, cells in zip(whole.names, whole.cells)]
    return ("mechanism", *(heading for _, heading in kept)), lines


def write_csv(rows: Iterable[Row], path: str | Path) -> Path:
    """All rows as a table: nested mappings become dotted columns, lists (curves) stay in the JSONL.

    Args:
        rows: result rows of any kind.
        path: of the CSV file; UTF-8, one header line, rows in the given order.
    """
    flat = [dict(_flatten(row)) for row in rows]
    first = ["kind", "backend", "status", "error", "id"]
    columns = first + sorted({key for row in flat for key in row} - set(first))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return write_atomic(path, out.getvalue())


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(item, dict):
            yield from _flatten(item, dotted)
        elif not isinstance(item, list) or dotted.startswith("config."):
            yield dotted, json.dumps(item) if isinstance(item, list) else item
