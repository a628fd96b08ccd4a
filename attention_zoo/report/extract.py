"""The page's tables by themselves: as CSV for a spreadsheet and as LaTeX for a paper."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_zoo.files import safe_name, write_atomic
from attention_zoo.report import lengths, rivals, units
from attention_zoo.report.cells import Table
from attention_zoo.report.groups import shortening
from attention_zoo.report.metrics import metric_words, spoken, value_words
from attention_zoo.report.quality import Task
from attention_zoo.report.summary import Findings, spreadsheet, summary
from attention_zoo.report.verdicts import verdicts_table
from attention_zoo.results.row import Row

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "≈": r"$\approx$", "≤": r"$\leq$", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "µ": r"\textmu{}",
    "–": "--", "…": r"\ldots{}", "“": "``", "”": "''", "\u00a0": "~",
}  # fmt: skip


LENGTHS = (f"effective length ({lengths.SHARE:.0%} of its own)", f"effective length ({lengths.LEVEL:.0%})")
LENGTH_NOTES = (
    f"effective length: the longest tested up to which accuracy stays at least {lengths.SHARE:.0%} of that at the "
    f"trained length, or at least {lengths.LEVEL:.0%}; > where it never falls; – where the trained length itself does "
    "not reach that, or beats no trivial rule",
)


def tables(found: Findings) -> dict[str, Table]:
    """The tables of the page by name: "summary", two for each task, "peers", "figures" and "budget"."""
    whole = summary(found)
    headers = ["mechanism", *(f"{group}: {name}" for group, names in whole.groups for name in names)]
    many = {"summary": Table(headers, [[name, *cells] for name, cells in zip(whole.names, whole.cells)], whole.notes)}
    for task in found.tasks:
        if any(each.rows for each in task.learnt):
            name = safe_name(task.title.replace(", ", "-").replace(" ", "-"))
            many |= {name: trainings_table(task), f"{name}-verdicts": verdicts_table(task)}
    if any(row["kind"] == "peer" for row in found.rows):
        many |= {"peers": rivals.peers_table(found.rows), "figures": rivals.figures_table(found.rows)}
    if any(row["kind"] == "budget" for row in found.rows):
        many["budget"] = rivals.budgets_table(found.rows)
    return {name: table for name, table in many.items() if table.cells}


def write_tables(found: Findings, folder: str | Path) -> list[Path]:
    """Each table as NAME.csv and NAME.tex.

    Raises:
        OSError: naming the file that could not be written.
    """
    paths = []
    for name, table in tables(found).items():
        paths.append(write_atomic(Path(folder) / f"{name}.csv", csv_text(table)))
        paths.append(write_atomic(Path(folder) / f"{name}.tex", latex(table)))
    return paths


def csv_text(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([spreadsheet(cell) for cell in line] for line in [table.headers, *table.cells])
    return out.getvalue()


def latex(table: Table) -> str:
    """A tabular in the rules of the package booktabs; its first column is flushed left, words of others too."""
    columns = list(zip(*table.cells))
    sides = "".join("l" if not place or _wordy(column) else "r" for place, column in enumerate(columns))
    head, *lines = [" & ".join(map(_escaped, line)) + r" \\" for line in [table.headers, *table.cells]]
    notes = [f"% {' '.join(note.split())}" for note in table.notes]
    inner = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*notes, rf"\begin{{tabular}}{{{sides}}}", *inner, r"\end{tabular}"]) + "\n"


def _wordy(cells: tuple[str, ...]) -> bool:
    """Whether a column is of words and not of figures."""
    figures = sum(bool(re.match(r"[≈≤>*\s]*[-+]?\d", cell)) or cell == units.NONE for cell in cells)
    return 2 * figures < len(cells)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text.replace("\n", " "))


def trainings_table(task: Task) -> Table:
    """What each group of runs took and reached: where they differ, from the least to the most."""
    sets = [f"{metric_words(task.metric)}: {spoken(name)}" for name in task.sets]
    further, reach = [metric_words(name) for name in task.further], lengths.tested(task)
    headers = [
        "",
        "seeds",
        "steps",
        "tokens seen",
        "training",
        "one step",
        "parameters",
        "FLOPs a token",
        "tokens/s in training",
        "tokens/s in inference",
        "peak memory in training",
        "state",
        "carries state",
        *sets,
        *further,
        *(LENGTHS if reach else []),
    ]
    cells = []
    for each in task.learnt:
        if not each.rows:
            cells.append([each.label, *[units.NONE] * (len(headers) - 2), each.words()])
            continue
        seeds = str(each.seeds) + (f", {len(each.failed)} without figure" if each.failed else "")
        scores = [value_words(each.on(name), task.metric) for name in task.sets]
        scores += [value_words(each.also(name), name) for name in task.further]
        scores += [lengths.words(found) for found in lengths.of(each, task) or (None, None)] if reach else []
        cells.append(
            [each.label, seeds, each.span("steps", units.count), each.span(_seen, units.count),
             each.span("train_seconds", units.seconds), each.span("step_seconds", units.seconds),
             each.span("parameters", units.millions), each.span(_given("flops_per_token"), units.millions),
             each.span("tokens_per_second", units.millions),
             each.span("evaluation_tokens_per_second", units.millions),
             each.span("peak_bytes", units.size), each.span(_given("state_bytes"), units.size),
             each.span("carries_state", lambda yes: "yes" if yes else "no"),
             *scores]
        )  # fmt: skip
    trivial: dict[str, list[str]] = {}
    for name, found in task.further.items():
        for rule, value in found.items():
            line = trivial.setdefault(f"({spoken(rule)})", [units.NONE] * (len(headers) - 1))
            line[headers.index(metric_words(name)) - 1] = value_words(value, name)
    notes = [*(LENGTH_NOTES if reach else []), *_cost_notes(task)]
    return Table(headers, cells + [[rule, *line] for rule, line in trivial.items()], notes)


def _given(key: str) -> Callable[[Row], Any]:
    return lambda row: (row.get("given") or {}).get(key)


def _cost_notes(task: Task) -> list[str]:
    """What the columns of costs are of, and why one of them is empty."""
    rows = [row for each in task.learnt for row in each.rows]
    if not rows:
        return []
    said = [
        "FLOPs and bytes of the state are of the definition, a forward call and one row; inference is the evaluation "
        "on the set of the result"
    ]
    if any(row.get("peak_bytes") is not None for row in rows):
        said.append("peak memory is of all tensors in training; on a CPU of its second step")
    return said


def _seen(row: Row) -> int | None:
    if shortening(row) and row.get("tokens_per_second") and row.get("train_seconds"):
        return round(row["tokens_per_second"] * row["train_seconds"])  # rows may be narrower than seq_len
    return row["steps"] * row["batch"] * row["seq_len"] if row.get("batch") else None
