"""The report: rows in, one HTML file out. Opens from disk without a network, on a phone and on a wide screen.

What may be said of the rows stands in sections, written here; what is looked for is found in the dashboard, which
`static` draws from the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attention_zoo.files import write_atomic
from attention_zoo.measure.identity import source_digest
from attention_zoo.report import costs, frame, page, rivals, units
from attention_zoo.report import rows as results
from attention_zoo.report.cells import Table
from attention_zoo.report.contexts import Group
from attention_zoo.report.data import dashboard
from attention_zoo.report.endings import ended
from attention_zoo.report.extract import trainings_table
from attention_zoo.report.inspected import Inspection
from attention_zoo.report.published import published
from attention_zoo.report.quality import Task
from attention_zoo.report.rows import LeftOut, Rows
from attention_zoo.report.summary import Findings, headline, labels, summary
from attention_zoo.report.verdicts import UNCERTAIN, verdicts_table
from attention_zoo.results.row import Row

TITLE = "Which attention, at what cost?"


def build_report(
    rows: Iterable[Row],
    path: str | Path,
    *,
    title: str = TITLE,
    attention: Sequence[tuple[str, Inspection]] = (),
    contexts: Sequence[tuple[str, Group]] = (),
) -> Path:
    """Draw the report.

    Args:
        rows: result rows of every kind (speed, peer, budget, quality, portrait), from `report.read` or fresh. One that
            is not what a row must be is named on the page, and the others are drawn.
        path: of the HTML file; parent folders are made, an older file is replaced whole.
        title: on top of the page.
        attention: what trained models attend to, see `report.inspected`.
        contexts: how much context groups of models make use of, see `report.contexts`.

    Returns:
        the path.

    Raises:
        ValueError: for no rows at all that can be drawn.
        OSError: naming the path, where it cannot be written.
    """
    found = findings(rows)
    return write_atomic(path, document(found, title, dashboard(found, (), attention, contexts)))


def findings(rows: Iterable[Row]) -> Findings:
    """What the rows say, of which the page is made.

    Raises:
        ValueError: for no rows at all that can be drawn.
    """
    rows = results.sift(rows)
    if not rows:
        first = f": {rows.left_out[0]}" if rows.left_out else ""
        raise ValueError(f"rows must hold at least one result, got none{first}")
    return Findings.of(rows)


def document(found: Findings, title: str, data: dict[str, Any], *, live: bool = False) -> str:
    """The whole page as HTML.

    Args:
        data: what the dashboard is drawn from.
        live: whether it asks its server for what is new.
    """
    title = results.clean(title)
    return page.page(title, frame.body(title, sections(found), live=live), data, live=live)


def sections(found: Findings) -> dict[str, str]:
    """What stands on the page in words: HTML by key, without the sections that would be empty."""
    rows, names = found.rows, labels(found.rows)
    many = {
        "lead": page.bullets(headline(found), "lead") + _warnings(rows, found),
        "summary": _summary(found),
        "advice": _advice(found),
        "peers": _peers(rows),
        "budget": _budget(rows),
        "learning": _learning(found.tasks),
        "published": _published(rows),
        "abilities": _abilities(rows, names),
        "method": _method(rows),
        "missing": _missing(rows, names),
        "left-out": _left_out(rows.left_out),
    }
    return {key: html for key, html in many.items() if html}


def _left_out(many: list[LeftOut]) -> str:
    if not many:
        return ""
    note = "These were to be read and are not what a result row must be. Everything else is drawn."
    return page.paragraph(note, "note") + page.table(
        Table(["where", "what is wrong"], [list(one) for one in many]), "text"
    )


def _warnings(rows: Rows, found: Findings) -> str:
    """What a reader must know before reading a figure."""
    said = []
    if rows.left_out:
        said.append(
            f"{len(rows.left_out)} rows or files could not be drawn and are left out; they are named at the end."
        )
    if rows.replaced:
        said.append(f"{rows.replaced} results of older code are not drawn: the same was measured again.")
    for task in found.tasks:
        said += [f"{task.title}: {obstacle}." for obstacle in task.obstacles()]
        said += [f"{unequal}." for unequal in (_patience(task), task.parity()) if unequal]
    failed = [row for row in rows if row["status"] == "failed"]
    lost = [row for row in rows if row["status"] not in ("ok", "failed")]
    if failed:
        said.append(f"{len(failed)} of {len(rows)} results failed; they are listed at the end.")
    if lost:
        kinds = sorted({results.status(row) for row in lost})
        said.append(
            f"{len(lost)} of {len(rows)} results hold no figure ({', '.join(kinds)}); they are marked in the charts."
        )
    old = results.stale(rows, source_digest())
    if old:
        said.append(f"{len(old)} of {len(rows)} results are stale: made by other code than that which drew this page.")
    machines = {str((row.get("environment") or {}).get("cpu")) for row in rows if row["kind"] != "portrait"}
    if len(machines) > 1:
        said.append(f"Results come from different machines ({'; '.join(sorted(machines))}): times cannot be compared.")
    return page.warning("Before you read on", said)


def _patience(task: Task) -> str | None:
    """A sentence on runs that were trained for unequal steps, each until it was no better on validation."""
    if not any(ended(row, "patience") for each in task.learnt for row in each.rows):
        return None
    said = ", ".join(f"{each.label} {each.span('steps', units.count)}" for each in task.learnt if each.rows)
    return f"{task.title}: runs ended by their own patience, not after equal steps: {said} steps"


def _summary(found: Findings) -> str:
    if not found.series and not found.tasks:
        return ""
    note = (
        "“Cheaper than … from” is the length in tokens from which a mechanism costs less than that form of full "
        "attention and stays cheaper as far as measured: interpolated between measured lengths, “≤” where it is so at "
        "the shortest one compared (or where the baseline no longer runs), “>” where it is not so up to the longest. "
        "The exponent is fitted to the three longest lengths measured: 1 is linear, 2 quadratic."
    )
    setting = f"Costs: {found.setting.words()}." if found.setting else ""
    table = summary(found)
    sets = {task.main: None for task in found.tasks if task.main}
    judged = "What was learnt is told by " + ", ".join(f"{task.judged} ({task.title})" for task in found.tasks) + "."
    note = " ".join([note, *([judged] if sets else []), *(f"{mark}." for mark in table.notes)])
    return page.summary_table(table) + page.paragraph(f"{setting} {note}", "note") + _gaps(found)


def _advice(found: Findings) -> str:
    from attention_zoo.advice.section import section  # it reads rows by this package, whose first import is this file

    return section(found.rows, found.setting, found.length)


def _gaps(found: Findings) -> str:
    """What a reader of the charts must know is not there: lengths that were not planned, settings without a figure."""
    said = []
    for setting in costs.settings(found.rows):
        many = costs.lines(found.rows, setting)
        if not any(results.ok(row) for series in many for row in series.rows.values()):
            said.append(f"No cell finished: {setting.words()}.")
        longest = max(length for series in many for length in series.rows)
        short = [f"{series.label} only to {max(series.rows):,}" for series in many if max(series.rows) < longest]
        if short:
            said.append(f"Not planned at every length ({setting.words()}): {', '.join(short)} tokens.")
    return page.bullets(said, "note") if said else ""


def _peers(rows: list[Row]) -> str:
    if not results.of(rows, "peer"):
        return ""
    return (
        page.paragraph(rivals.FAIR, "note")
        + page.table(rivals.peers_table(rows), "text")
        + page.bullets(rivals.fairness(rows), "note")
        + "<h3>Figures to reach</h3>"
        + page.paragraph(rivals.GOALS, "note")
        + page.table(rivals.figures_table(rows), "text")
    )


def _budget(rows: list[Row]) -> str:
    if not results.of(rows, "budget"):
        return ""
    return page.paragraph(rivals.BUDGET, "note") + page.table(rivals.budgets_table(rows), "text")


def _learning(tasks: list[Task]) -> str:
    parts = []
    for task in tasks:
        if not any(each.rows for each in task.learnt):
            parts.append(page.paragraph(f"{task.title}: no training finished.", "note"))
            continue
        parts.append(f"<h3>{page.escape(task.title)}</h3>")
        parts.append(page.warning("", [f"{o[0].upper()}{o[1:]}." for o in task.obstacles()]))
        shortened = task.shortened()
        parts += [page.paragraph(shortened, "note")] if shortened else []
        if (found := verdicts_table(task)).cells:
            parts.append(page.table(found, "text"))
        parts.append(page.table(trainings_table(task)))
    return "".join(parts)


def _published(rows: list[Row]) -> str:
    """Other people's tables with ours beside."""
    return "".join(
        f"<h3>{page.escape(title)}</h3>{page.table(table)}{page.bullets(notes, 'note')}"
        for title, table, notes in published(rows)
    )


def _abilities(rows: list[Row], names: dict[int, str]) -> str:
    portraits = [row for row in results.of(rows, "portrait") if results.ok(row)]
    if not portraits:
        return ""
    keys = list(dict.fromkeys(key for row in portraits for key in row["abilities"]))
    cells = [[names[id(row)], *(_ability(row["abilities"].get(key)) for key in keys)] for row in portraits]
    note = "As each mechanism declares them in code; the contract suite proves them."
    return page.table(Table(["", *(key.replace("_", " ") for key in keys)], cells), "text") + page.paragraph(
        note, "note"
    )


def _ability(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _method(rows: list[Row]) -> str:
    speed = [row for row in results.of(rows, "speed") if results.ok(row)]
    said = [
        "Each cell ran in a fresh process, alone on the machine. Layer cells include the projections; core cells are "
        "given queries, keys and values.",
        "Peak bytes: the largest sum of tensor bytes alive at once during one call, inputs and gradients made by the "
        "call included, parameters and the interpreter excluded. " + _methods(speed),
    ]
    if speed:
        repeats = sorted({row["repeats"] for row in speed if row.get("repeats")})
        warm = sorted({row["warmup"] for row in speed if row.get("warmup") is not None})
        said.append(
            f"Seconds: the median of the timed calls ({_range(repeats)}) after warm-up calls ({_range(warm)}); "
            "bars in the chart run from the fastest to the slowest."
        )
    if results.of(rows, "quality"):
        said.append(
            "Quality: same skeleton, same data, same optimizer and same budget for all, but where a name says in what "
            "runs differ; every run in a fresh process. Figures are those of the test set, where there is one; the "
            "validation set was looked at while training. Neither was trained on: drawn rows are in one set alone, and "
            "text that repeats the training's was left out. The held-out set is text of another source. Lines in "
            "parentheses need no model: chance, and trivial rules."
        )
        said.append(f"Verdicts: {UNCERTAIN}")
    return page.bullets(said) + "<h3>Environment</h3>" + _environment(rows)


def _methods(speed: list[Row]) -> str:
    names = sorted({str(row["peak_method"]) for row in speed if row.get("peak_method")})
    return f"Method: {', '.join(names)}." if names else ""


def _range(values: list[int]) -> str:
    return "?" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _environment(rows: list[Row]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        for key, value in (row.get("environment") or {}).items():
            words = _environment_words(key, value)
            if words not in found.setdefault(key, []):
                found[key].append(words)
    lines = "".join(
        f"<dt>{page.escape(key)}</dt><dd>{page.escape('; '.join(said))}</dd>" for key, said in found.items()
    )
    return f"<dl>{lines}</dl>"


def _environment_words(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_environment_words(k, v)}" for k, v in value.items())
    if key.endswith("_bytes") and isinstance(value, int | float) and not isinstance(value, bool):
        return units.size(value)
    return "none" if value is None else str(value)


def _missing(rows: list[Row], names: dict[int, str]) -> str:
    def what(row: Row) -> str:
        return results.what(row, names.get(id(row)))

    lost = [[what(row), results.status(row), row.get("error") or units.NONE] for row in rows if not results.ok(row)]
    old = [
        [what(row), "stale", f"made by code {row['environment']['source']}, drawn by {source_digest()}"]
        for row in results.stale(rows, source_digest())
    ]
    if not lost and not old:
        return page.paragraph("Nothing: every planned result is there, made by the code that drew this page.")
    return page.table(Table(["", "status", "reason"], [*lost, *old]), "text")
