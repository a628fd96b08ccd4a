"""The report: rows in, one HTML file out. Opens from disk without a network, on a phone and on a wide screen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attention_zoo.files import write_atomic
from attention_zoo.measure.identity import source_digest
from attention_zoo.report import charts, page, rivals, units
from attention_zoo.report import rows as results
from attention_zoo.report.charts import Chart, Table
from attention_zoo.report.costs import MEMORY, TIME, Series, Setting
from attention_zoo.report.palette import Style, styles
from attention_zoo.report.quality import METRIC_WORDS, Task, spoken, value_words
from attention_zoo.report.rows import Row
from attention_zoo.report.summary import Findings, headline, summary

TITLE = "Which attention, at what cost?"


def build_report(rows: Iterable[Row], path: str | Path, *, title: str = TITLE) -> Path:
    """Draw the report.

    Args:
        rows: result rows of every kind (speed, peer, budget, quality, portrait), from `report.rows.read` or fresh.
        path: of the HTML file; parent folders are made, an older file is replaced whole.
        title: on top of the page.

    Returns:
        the path.

    Raises:
        ValueError: for no rows at all.
    """
    rows = results.unique(rows)
    if not rows:
        raise ValueError("rows must hold at least one result, got none")
    found = Findings.of(rows)
    look = styles(row["backend"] for row in rows)
    drawn: list[Chart] = []

    def show(*many: Chart | None) -> str:
        kept = [each for each in many if each is not None]
        drawn.extend(kept)
        return page.charts(kept)

    cost = charts.all_costs(rows, look)
    sections = [
        ("summary", "Summary", _summary(found)),
        ("cost", "Memory and time against length", _costs(cost, show)),
        ("peers", "Against other implementations", _peers(rows, look, show)),
        ("budget", "The longest length within a memory", _budget(rows)),
        ("pareto", "Quality against cost", _pareto(found, look, show)),
        ("learning", "What they learnt", _learning(found.tasks, look, show)),
        ("patterns", "What each token sees", _pictures(rows, look, show)),
        ("abilities", "Abilities", _abilities(rows)),
        ("method", "How this was measured", _method(rows)),
        ("missing", "What is missing or old", _missing(rows)),
    ]
    sections = [each for each in sections if each[2]]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = (
        f"<h1>{page.escape(title)}</h1>"
        + page.bullets(headline(found), "lead")
        + _warnings(rows, found)
        + f"<nav>{links}</nav>"
        + "".join(page.section(key, heading, content) for key, heading, content in sections)
        + "<footer>Drawn by attention_zoo from result rows alone; every figure can be read in results.jsonl.</footer>"
    )
    return write_atomic(path, page.page(title, body, drawn))


def _warnings(rows: list[Row], found: Findings) -> str:
    """What a reader must know before reading a figure."""
    said = []
    for task in found.tasks:
        said += [f"{task.title}: {obstacle}." for obstacle in task.obstacles()]
        parity = task.parity()
        said += [f"{parity}."] if parity else []
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
    return page.summary_table(summary(found)) + page.paragraph(f"{setting} {note}", "note")


def _costs(cost: list[tuple[Setting, list[Series], list[Chart]]], show: Any) -> str:
    parts = []
    for setting, many, two in cost:
        parts.append(show(*two))
        planned = sorted({length for series in many for length in series.rows})
        short = [f"{s.label} only to {max(s.rows):,}" for s in many if max(s.rows) < planned[-1]]
        if short:
            parts.append(page.paragraph(f"Not planned at every length: {', '.join(short)} tokens.", "note"))
        if not two:
            parts.append(page.paragraph(f"No cell finished: {setting.words()}.", "note"))
    return "".join(parts)


def _peers(rows: list[Row], look: dict[str, Style], show: Any) -> str:
    if not results.of(rows, "peer"):
        return ""
    return (
        page.paragraph(rivals.FAIR, "note")
        + show(*rivals.ratios(rows, look))
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


def _pareto(found: Findings, look: dict[str, Style], show: Any) -> str:
    if found.length is None or not found.tasks:
        return ""
    task = found.tasks[0]
    two = [charts.pareto(task, found.series, found.length, look, key) for key in (MEMORY, TIME)]
    note = (
        "Quality is that of the models trained here; cost is that of one layer at the longest length that all "
        "finished. Full attention stands twice: its two kernels compute the same and differ in cost alone."
    )
    drawn = show(*two)
    return page.paragraph(note, "note") + drawn if drawn else ""


def _learning(tasks: list[Task], look: dict[str, Style], show: Any) -> str:
    parts = []
    for task in tasks:
        if not any(each.rows for each in task.learnt):
            parts.append(page.paragraph(f"{task.title}: no training finished.", "note"))
            continue
        parts.append(f"<h3>{page.escape(task.title)}</h3>")
        parts.append(page.warning("", [f"{o[0].upper()}{o[1:]}." for o in task.obstacles()]))
        parts.append(page.table(_runs(task)))
        accuracy = task.metric == "accuracy"
        parts.append(
            show(
                charts.accuracy(task, look),
                charts.trajectory(
                    task, look, "loss_by_position", x="tokens read before", title="Loss by position",
                    note=f"{task.title}: loss on held-out text by how much of it came before. A mechanism that carries "
                    "state reads on over segments; the others start each segment afresh.",
                ),
                charts.trajectory(
                    task, look, "quality_curve", x="step", title="Accuracy while training", metric=True,
                    note=f"{task.title}: on the main evaluation set.",
                ) if accuracy else None,
                charts.trajectory(
                    task, look, "curve", x="step", title="Learning curve",
                    note=f"{task.title}: training loss, each point the mean since the point before.",
                ),
            )
        )  # fmt: skip
    return "".join(parts)


def _runs(task: Task) -> Table:
    """What each run took and reached."""
    sets = [f"{METRIC_WORDS[task.metric]}: {spoken(name)}" for name in task.sets]
    headers = ["", "seeds", "steps", "tokens seen", "training", "one step", "parameters", "carries state", *sets]
    cells = []
    for each in task.learnt:
        if not each.rows:
            cells.append([each.label, *[units.NONE] * (len(headers) - 2), each.words()])
            continue
        row = each.rows[0]
        seen = row["steps"] * row["batch"] * row["seq_len"] if row.get("batch") else None
        scores = [value_words(each.on(name), task.metric) for name in task.sets]
        cells.append(
            [each.label, str(each.seeds), units.count(row.get("steps")), units.count(seen),
             units.seconds(row.get("train_seconds")), units.seconds(row.get("step_seconds")),
             units.millions(row.get("parameters")), "yes" if row.get("carries_state") else "no", *scores]
        )  # fmt: skip
    return Table(headers, cells)


def _pictures(rows: list[Row], look: dict[str, Style], show: Any) -> str:
    portraits = [row for row in results.of(rows, "portrait") if results.ok(row)]
    if not portraits:
        return ""
    note = (
        "Found by asking each layer: one input token is changed, and every output that moves has seen it. One head, "
        "causal, at small options so that borders show. What is read without gradient (detached memory) is grey."
    )
    return page.paragraph(note, "note") + show(*(charts.picture(row, look[row["backend"]]) for row in portraits))


def _abilities(rows: list[Row]) -> str:
    portraits = [row for row in results.of(rows, "portrait") if results.ok(row)]
    if not portraits:
        return ""
    keys = list(dict.fromkeys(key for row in portraits for key in row["abilities"]))
    cells = [[row["backend"], *(_ability(row["abilities"].get(key)) for key in keys)] for row in portraits]
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
            "Quality: same skeleton, same data, same optimizer and same budget for all; every run in a fresh process. "
            "Bits per byte are those of held-out text; chance is 8."
        )
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
    if key.endswith("_bytes") and value is not None:
        return units.size(value)
    return "none" if value is None else str(value)


def _missing(rows: list[Row]) -> str:
    lost = [[results.what(row), results.status(row), row.get("error") or units.NONE]
            for row in rows if not results.ok(row)]  # fmt: skip
    old = [
        [results.what(row), "stale", f"made by code {row['environment']['source']}, drawn by {source_digest()}"]
        for row in results.stale(rows, source_digest())
    ]
    if not lost and not old:
        return page.paragraph("Nothing: every planned result is there, made by the code that drew this page.")
    return page.table(Table(["", "status", "reason"], [*lost, *old]), "text")
