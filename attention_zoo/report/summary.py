"""The one table and the sentences that a reader takes away: derived from rows, shown in HTML, terminal and CSV."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from attention_zoo.files import write_atomic
from attention_zoo.measure.derived import Efficiency
from attention_zoo.overview import markdown
from attention_zoo.report import costs, groups, lengths, quality, units, verdicts
from attention_zoo.report import rows as results
from attention_zoo.report.costs import MEMORY, TIME, Series, Setting
from attention_zoo.report.joined import Line, at_other_options, lines_of
from attention_zoo.report.metrics import value_words
from attention_zoo.report.quality import Task
from attention_zoo.report.rows import Rows
from attention_zoo.report.units import NONE
from attention_zoo.results.row import Row

PROSE = {"dense": "materialised full attention", "sdpa": "fused full attention"}
"""The baselines in a sentence, by kernel."""
MOST_LINES = 40
"""Of the table in a terminal, at some hundred columns: what is beyond stands in the report."""
MOST_SAID = 10
"""Sentences of a kind in a terminal."""
LONGEST = 1000
"""Characters of one of them."""


@dataclass(frozen=True)
class Findings:
    """What the rows say, worked out once.

    Fields:
        setting: the setting with most speed rows; None without speed rows.
        series: its lines.
        length: the longest length at which all of them hold figures.
        tasks: all that was trained on.
        rows: what all of this was found in, and what was left out of it.
    """

    setting: Setting | None
    series: list[Series]
    length: int | None
    tasks: list[Task]
    rows: Rows

    @staticmethod
    def of(rows: Iterable[Row]) -> Findings:
        rows = results.sift(rows)
        found = costs.settings(rows)
        series = costs.lines(rows, found[0]) if found else []
        length = costs.longest_common_length(series)
        return Findings(found[0] if found else None, series, length, quality.tasks(rows), rows)

    def baseline(self, kernel: str, place: dict[str, str] | None = None) -> Series | None:
        """A form of full attention, measured where `place` says."""
        found = [each for each in self.series if (each.backend, each.kernel) == ("full", kernel)]
        return next((each for each in found if place is None or each.place == place), None)

    def places(self) -> list[tuple[str, list[Series]]]:
        """The lines by where they were measured, each place in words: nothing where there is one only."""
        found: dict[tuple[tuple[str, str], ...], list[Series]] = {}
        for series in self.series:
            found.setdefault(series.group.place, []).append(series)
        keys = groups.differing([dict(place) for place in found])
        if len({dict(place).get("file") for place in found}) == len(found):
            keys = [key for key in keys if key == "file"]
        said = groups.apart([", ".join(groups.words(dict(place), keys)) for place in found])
        return list(zip(said, found.values()))

    def cheaper_from(self, series: Series, kernel: str, key: str) -> Efficiency | None:
        """Efficiency length against one baseline; None for a baseline itself, or where nothing can be compared."""
        baseline = self.baseline(kernel, series.place)
        return None if baseline is None or series.backend == "full" else costs.overtakes(series, baseline, key)


@dataclass(frozen=True)
class Summary:
    """A table with two header lines: groups of columns, then columns. The first column is the mechanism; `notes` say
    what the marks in it mean."""

    groups: list[tuple[str, list[str]]]
    names: list[str]
    cells: list[list[str]]
    notes: list[str]


def summary(found: Findings) -> Summary:
    """One line per mechanism; per kernel, option set, training and file where there are several."""
    columns: list[tuple[str, str, list[str]]] = []
    lines = lines_of(found.series, found.tasks)
    for number, (task, name) in enumerate(zip(found.tasks, quality.names_apart(found.tasks))):
        said = [" / ".join(line.said(each) for each in line.learnt[number]) for line in lines]
        columns.append(("What it learnt", f"{name}: {task.brief}", [words or NONE for words in said]))
    for number, (task, name) in enumerate(zip(found.tasks, quality.names_apart(found.tasks))):
        if lengths.tested(task):
            both = [[lengths.of(each, task) or (None, None) for each in line.learnt[number]] for line in lines]
            for place, rule in enumerate((f"{lengths.SHARE:.0%} of its own", f"{lengths.LEVEL:.0%}")):
                said = [" / ".join(lengths.words(each[place]) for each in many) or NONE for many in both]
                columns.append(("Effective length", f"{name}: {rule}", said))
    if found.length is not None:
        columns += _at(f"At {found.length:,} tokens", lines, [found.length for _ in lines])
    if found.series:
        own = [max(line.series.values(TIME), default=None) if line.series else None for line in lines]
        longest = "At its longest measured"
        columns.append((longest, "tokens", [units.count(length) for length in own]))
        columns += _at(longest, lines, own)
        for key, noun in ((TIME, "time"), (MEMORY, "memory")):
            exponents = [costs.growth(line.series, key) if line.series else None for line in lines]
            columns.append(("Grows as length to the", noun, [units.fixed(g) for g in exponents]))
        for kernel, title in (("dense", "Cheaper than materialised from"), ("sdpa", "Cheaper than fused from")):
            for key, noun in ((TIME, "time"), (MEMORY, "memory")):
                crossings = [found.cheaper_from(line.series, kernel, key) if line.series else None for line in lines]
                columns.append((title, noun, [costs.crossing_words(c) if c else NONE for c in crossings]))
    if found.tasks:
        held = [[row for many in line.learnt for each in many for row in each.rows] for line in lines]
        sizes = [[row["parameters"] for row in rows if row.get("parameters") is not None] for rows in held]
        ends = [[units.millions(end(many)) for end in (min, max)] if many else [NONE] for many in sizes]
        columns.append(("Model", "parameters", [" to ".join(dict.fromkeys(said)) for said in ends]))
        carries = [{row["carries_state"] for row in rows if row.get("carries_state") is not None} for rows in held]
        words = [" / ".join("yes" if one else "no" for one in sorted(many)) for many in carries]
        columns.append(("Model", "carries state", [said or NONE for said in words]))

    heads: list[tuple[str, list[str]]] = []
    for group, name, _ in columns:
        if not heads or heads[-1][0] != group:
            heads.append((group, []))
        heads[-1][1].append(name)
    cells = [list(cells) for cells in zip(*(c for *_, c in columns))]
    names, trivial = [line.label for line in lines], dict[str, list[str]]()
    for number, task in enumerate(found.tasks):  # what needs no model stands below, in the same columns
        for name, value in task.bars.items():
            trivial.setdefault(f"({name})", [NONE] * len(columns))[number] = value_words(value, task.metric)
    return Summary(
        heads,
        [*names, *trivial],
        [*cells, *trivial.values()],
        [*costs.marks(found.series), *at_other_options(found.tasks, lines)],
    )


def _at(group: str, lines: list[Line], lengths: Sequence[int | None]) -> Iterator[tuple[str, str, list[str]]]:
    for key, noun in ((TIME, "time"), (MEMORY, "peak memory")):
        yield group, noun, [line.series.said(key, n) if line.series else NONE for line, n in zip(lines, lengths)]


def headline(found: Findings) -> list[str]:
    """The sentences on top of the report: figures that were measured, and no verdict where none may be given."""
    said = []
    for place, many in found.places():
        where = f"{place}: " if place else ""
        common = found.length or costs.longest_common_length(many)
        if common is not None:
            both = (_cost_sentence(found, many, common, key) for key in (MEMORY, TIME))
            said += [where + sentence for sentence in both if sentence]
            said += [where + sentence for sentence in _overtaking(found, many)]
    for task in found.tasks:
        if not any(each.rows for each in task.learnt):
            continue
        said.append(verdicts.sentence(task))
    return said


def remarks(found: Findings) -> list[str]:
    """What did not go well, a line each: results without a figure, and what could not be read or drawn."""
    names = labels(found.rows)
    lost = [row for row in found.rows if not results.ok(row)]
    said = [f"{results.what(row, names.get(id(row)))}: {results.why(row)}" for row in lost]
    return said + [f"left out: {each}" for each in found.rows.left_out]


def _cost_sentence(found: Findings, many: list[Series], length: int, key: str) -> str:
    """The cheapest mechanism beside both baselines, at the longest common length, among what was measured alike."""
    verb, best = ("peaks at", "least") if key == MEMORY else ("takes", "fastest")
    phase = (found.setting.phase if found.setting else "").replace("_", " + ")
    order = sorted(
        (each for each in many if not each.baseline and length in each.values(key)),
        key=lambda each: each.values(key)[length],
    )
    parts = []
    if order:
        rivals = [each.label for each in order[1:] if key == TIME and _overlap(order[0], each, length)]
        others = (
            sum(not each.baseline and length in each.memory() for each in many) - len(order) if key == MEMORY else 0
        )
        why = f"{best} of {len(order)}" if len(order) > 1 else "the only one measured"
        why = f"too close to call with {units.listed(rivals)}" if rivals else why
        why += f"; {others} measured by resident set are not compared" if others else ""
        parts.append(f"{order[0].said(key, length)} with {order[0].label} ({why})")
    for kernel in ("sdpa", "dense"):
        baseline = next((each for each in many if (each.backend, each.kernel) == ("full", kernel)), None)
        if baseline is not None and length in baseline.values(key):
            parts.append(f"{baseline.said(key, length)} with {PROSE[kernel]}")
    return f"At {length:,} tokens one {phase} call {verb} {units.listed(parts)}." if parts else ""


def _overtaking(found: Findings, many: list[Series]) -> list[str]:
    """Where the efficient mechanisms become faster than fused full attention."""
    faster, slower = [], []
    for series in many:
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
    said = f"Faster than fused full attention: {units.listed(faster)}" if faster else ""
    if slower:
        names, lengths = units.listed([label for label, _ in slower]), sorted({length for _, length in slower})
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


def rich_table(found: Findings, most: int | None = None) -> RichTable:
    """What fits a terminal of 80 columns: quality, cost at the common length, growth, overtaking fused attention.

    Args:
        found: what is shown.
        most: lines of text after which no further mechanism is shown, but how many more there are; None: all are.
    """
    headings, lines, notes = _brief(found)
    if most is not None and (left := len(lines) - _fit(lines, most)):
        lines, notes = lines[: len(lines) - left], [*notes, f"and {left} more, in the report"]
    table = RichTable(
        title_justify="left", header_style="bold", padding=(0, 1, 0, 0), box=box.SIMPLE, pad_edge=False, show_edge=False
    )
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        # a narrow terminal folds words rather than cut them
        table.add_column(Text("\n".join(heading)), justify="right", overflow="fold")
    for name, *cells in lines:
        # text of rows is no markup; a range goes below its figure
        table.add_row(*map(Text, _folded(name, cells)))
    return table


def _folded(name: str, cells: Sequence[str]) -> list[str]:
    return [textwrap.fill(name, 18), *(cell.replace(" (", "\n(") for cell in cells)]


def _fit(lines: Sequence[Sequence[str]], most: int) -> int:
    """How many mechanisms, one at least, have their lines of text within `most`."""
    heights = (max(cell.count("\n") + 1 for cell in _folded(name, cells)) for name, *cells in lines)
    return max(1, sum(total <= most for total in accumulate(heights))) if lines else 0


def show(rows: list[Row], path: Path, console: Console) -> None:
    """The summary for a terminal: table, sentences, what failed, where the report is; of many only the first."""
    found = Findings.of(rows)
    console.print(rich_table(found, MOST_LINES))
    for sign, said, style in (("•", headline(found), None), ("!", remarks(found), "yellow")):
        more = [f"and {len(said) - MOST_SAID} more, in the report"] if len(said) > MOST_SAID else []
        for line in [*said[:MOST_SAID], *more]:
            whole = line if len(line) <= LONGEST else f"{line[:LONGEST]} … (whole in the report)"
            console.print(f"{sign} {whole}", markup=False, highlight=False, soft_wrap=True, style=style)
    console.print(f"\nreport: {path.resolve()}", markup=False, highlight=False, soft_wrap=True)


def markdown_table(found: Findings) -> str:
    """The same for a README."""
    headings, lines, _ = _brief(found)
    return markdown([headings[0], *(" ".join(heading) for heading in headings[1:])], lines)


def _brief(found: Findings) -> tuple[tuple[Any, ...], list[list[str]], list[str]]:
    """The columns that matter most, each heading in lines; the cells; and what marks in them mean."""
    whole = summary(found)
    flat = [(group, column) for group, columns in whole.groups for column in columns]
    short = {
        ("Grows as length to the", "time"): ("time ~", "length^"),
        ("Cheaper than fused from", "time"): ("faster than", "fused from"),
    }
    kept: list[tuple[int, tuple[str, ...]]] = []
    for number, (group, column) in enumerate(flat):
        if group == "What it learnt":
            task, _, metric = column.rpartition(": ")
            name, _, length = task.rpartition(", ") if task.endswith(" tokens") else (task, "", "")
            kept.append((number, (name, *([length] if length else []), *metric.split(", "))))
        elif group.startswith("At ") and group.endswith(" tokens"):
            kept.append((number, (column, f"{group[0].lower()}{group[1:].removesuffix(' tokens')}")))
        elif (group, column) in short:
            kept.append((number, short[group, column]))
    lines = [[name, *(cells[number] for number, _ in kept)] for name, cells in zip(whole.names, whole.cells)]
    notes = [note for note in whole.notes if any(note[0] in cell for line in lines for cell in line[1:])]
    return ("mechanism", *(heading for _, heading in kept)), lines, notes


def labels(rows: Rows) -> dict[int, str]:
    """What each row is called in charts and tables, by the identity of the row in memory."""
    found = {id(row): each.label for setting in costs.settings(rows) for each in costs.lines(rows, setting)
             for row in each.rows.values()}  # fmt: skip
    for task in quality.tasks(rows):
        found |= {id(row): each.label for each in task.learnt for row in [*each.rows, *each.failed]}
    pictures = results.of(rows, "portrait")
    many = groups.gather(pictures)
    for label, members in zip(groups.labels(list(many), {}), many.values()):
        found |= {id(row): label for row in members}
    return found


def write_csv(rows: Iterable[Row], path: str | Path) -> Path:
    """All rows as a table: nested mappings become dotted columns, lists (curves) stay in the JSONL.

    Text that a spreadsheet would take for a formula stands behind an apostrophe; numbers stay numbers.

    Args:
        rows: result rows of any kind; those that hold no result are left out, see `rows.sift`.
        path: of the CSV file; UTF-8, one header line, rows in the given order.
    """
    rows = results.sift(rows)
    names = labels(rows)
    flat = [{"label": names.get(id(row), row["backend"]), **dict(_flatten(row))} for row in rows]
    first = ["kind", "backend", "status", "error", "id", "label"]
    columns = first + sorted({key for row in flat for key in row} - set(first))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(spreadsheet, columns))
    writer.writerows([spreadsheet(row.get(column)) for column in columns] for row in flat)
    return write_atomic(path, out.getvalue())


def spreadsheet(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such text stands behind an apostrophe; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(item, dict):
            yield from _flatten(item, dotted)
        elif not isinstance(item, list) or dotted.startswith("config."):
            yield dotted, json.dumps(item) if isinstance(item, list) else item
