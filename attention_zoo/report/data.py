"""What the dashboard is drawn from: rows with their configs, curves, environments and errors, as one small JSON value.

Curves are thinned to what a chart can show and figures to five digits; results.jsonl holds all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attention_zoo.measure.identity import source_digest
from attention_zoo.report import contexts, costs, groups, inspected, lengths, rivals
from attention_zoo.report import rows as results
from attention_zoo.report.again_by import command_of
from attention_zoo.report.beside import pairs
from attention_zoo.report.fields import Fields, facts
from attention_zoo.report.learnt import missing
from attention_zoo.report.metrics import SHARES, metric_words
from attention_zoo.report.palette import styles
from attention_zoo.report.quality import LEARNT, Task
from attention_zoo.report.summary import Findings, labels
from attention_zoo.results.row import Row

POINTS = 160
"""Of a curve, at most: a chart is some 600 pixels wide."""
DIGITS = 5
FIGURES = (
    "seconds", "seconds_min", "seconds_max", "tokens_per_second", "state_bytes", "floor_ratio", "flops", "parameters",
    "train_seconds", "step_seconds", "steps", "peak_bytes", "resident_bytes", "predicted_bytes", "time_ratio",
    "time_ratio_min", "time_ratio_max", "memory_ratio", "their_seconds", "their_peak_bytes", "budget_bytes",
    "bytes_per_token", "evaluation_tokens_per_second",
)  # fmt: skip
GIVEN = ("flops_per_token", "state_bytes")
"""Of what a trained backend was given."""
CURVES = ("curve", "quality_curve", "loss_by_position")


def dashboard(
    found: Findings,
    running: Sequence[Row] = (),
    attention: Sequence[tuple[str, inspected.Inspection]] = (),
    measured: Sequence[tuple[str, contexts.Group]] = (),
) -> dict[str, Any]:
    """The value that the page's scripts read.

    Args:
        found: in rows that were sifted.
        running: trainings that have not ended, as rows of status "running" with the curves that they have so far.
        attention: what was inspected, see `inspected`.
        measured: how much context groups of models use, see `contexts`.

    Returns:
        fields: [name, values] of words, see `Fields`; runs: each with `f`, its values by their place, `n`, its figures,
        and its curves; styles: of each label; tasks and settings: what is known of them, in the order of importance;
        lost: statuses in words; attention and contexts: see `inspected.drawn` and `contexts.drawn`.
    """
    rows = [*(row for row in found.rows if row["kind"] != "published"), *running]  # those are nobody's runs here
    names = labels(found.rows)
    fields, mine = Fields(), source_digest()
    task_of = {id(row): task for task in found.tasks for each in task.learnt for row in [*each.rows, *each.failed]}
    begun = {row["task"]: _titles(found, row["task"]) for row in running if row.get("task")}
    runs, keys = [], set[str]()
    for number, row in enumerate(rows):
        label = names.get(id(row)) or (rivals.named(row) if row["kind"] in ("peer", "budget") else row["backend"])
        key = str(row.get("id") or f"row-{number + 1}")
        while key in keys:  # the same work in two files
            key += "+"
        keys.add(key)
        task = task_of.get(id(row))
        title = task.title if task else begun.get(row.get("task"), row.get("task"))
        runs.append(_run(row, key, label, task, title, fields, mine))
    lines = {run["label"]: row["backend"] for run, row in zip(runs, rows)}
    known = {run["key"]: run["label"] for run in runs}
    for _, inspection in attention:
        for each in inspection["runs"]:
            label = inspected.label_of(each, known)
            lines.setdefault(label, each["backend"] or label)
    for _, group in measured:
        for model in group["runs"]:
            label = contexts.label_of(model, group["runs"], known)
            lines.setdefault(label, model["backend"] or label)
    settings = costs.settings(found.rows)
    beside = [_beside(task, setting, found) for task in found.tasks for setting in settings]
    return {
        "fields": fields.table(),
        "runs": runs,
        "styles": styles(lines),
        "tasks": [_task(task) for task in [*found.tasks, *_unknown(begun, found)]],
        "settings": [setting.words() for setting in settings],
        "beside": [each for each in beside if each["pairs"]],
        "lost": results.STATUS,
        "learnt": LEARNT,
        "attention": inspected.drawn(attention, known),
        "contexts": contexts.drawn(measured, known),
    }


def _titles(found: Findings, name: str) -> str:
    """The title of a task of which a training has begun: where several go by its name, that is all there is to say."""
    known = [task.title for task in found.tasks if task.name == name]
    return known[0] if len(known) == 1 else name


def _unknown(begun: dict[str, str], found: Findings) -> list[Task]:
    """Tasks of which no training has ended yet."""
    known = {task.title for task in found.tasks}
    return [Task(title, 0, "loss", []) for title in dict.fromkeys(begun.values()) if title not in known]


def _run(
    row: Row, key: str, label: str, task: Task | None, title: str | None, fields: Fields, mine: str
) -> dict[str, Any]:
    plain: dict[str, Any] = {"label": label, "task": title}
    if row["kind"] == "speed":
        plain["setting"] = costs.setting_of(row).words()
    run: dict[str, Any] = {"key": key, "label": label, "f": fields.add(facts(row, plain)), "n": _figures(row, task)}
    if not results.ok(row):
        run["why"] = missing(row) if row["kind"] == "quality" else results.status(row)
        run["error"] = row.get("error")
    if (row.get("environment") or {}).get("source") not in (None, mine):
        run["stale"] = True
    if command := command_of(row):
        run["command"] = command
    for name in CURVES:
        if row.get(name):
            run[name] = _curve(row[name])
    if row.get("by_group"):
        run["groups"] = _groups(row["by_group"])
    run["others"] = _others(row)
    if task and len(along := lengths.by_length(row, task.metric)) > 1:
        run["by_length"] = [list(along), [_short(value) for value in along.values()]]
        run["trained"] = lengths.trained_length([row])
    if task and row.get("evaluations"):
        scored = {name: scores.get(task.metric) for name, scores in row["evaluations"].items()}
        run["sets"] = {name: _short(value) for name, value in scored.items() if value is not None}
    if row.get("readings"):
        run["readings"] = {name: _curve(points) for name, points in row["readings"].items()}
    if row["kind"] == "portrait" and results.ok(row):
        run["pairs"] = row["pairs"]
        run["options"] = ", ".join(f"{name}={value}" for name, value in results.options(row).items())
    if row["kind"] == "peer":
        run["against"] = row["title"]
        run["setting"] = rivals.setting(row)
    return {name: value for name, value in run.items() if name in ("f", "n") or value not in (None, {}, [])}


def _groups(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [[_short(n) for n in line] for line in many] for name, many in found.items()}


def _others(row: Row) -> dict[str, Any]:
    """Evaluation sets beside that of the result, with the tokens of their rows, groups of answers and positions; but
    for the set that was looked at in training."""
    found = {}
    for name, told in (row.get("by_set") or {}).items():
        if name not in (lengths.main_set(row), "validation"):
            found[name] = {
                "length": told.get("seq_len"),
                "groups": _groups(told.get("by_group") or {}),
                "position": _curve(told["loss_by_position"]) if told.get("loss_by_position") else None,
            }
    return found


def _figures(row: Row, task: Task | None) -> dict[str, Any]:
    """Numbers of a run; a training's metrics stand under their own names, that of its task under "score" too."""
    given = row.get("given") or {}
    found = {name: row.get(name) for name in FIGURES}
    found |= {name: given[name] for name in GIVEN if given.get(name) is not None}
    metrics = row.get("metrics") or {}
    found |= {f"metrics.{name}": value for name, value in metrics.items()}
    if task and task.metric in metrics:
        found["score"] = metrics[task.metric]
    return {name: _short(value) for name, value in found.items() if _number(value)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> Any:
    """A number with as many digits as anybody reads."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}")


def _curve(points: Sequence[Sequence[float]]) -> list[list[Any]]:
    """Columns of points: x, then each value; of a long curve the means of neighbours, its last point always."""
    size = -(-len(points) // POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    thin = [[part[-1][0], *(sum(values) / len(values) for values in list(zip(*part))[1:])] for part in parts]
    return [[_short(value) for value in column] for column in zip(*thin)]


def _task(task: Task) -> dict[str, Any]:
    return {
        "title": task.title, "metric": task.metric, "words": metric_words(task.metric), "judged": task.judged,
        "lower": task.lower_is_better, "share": task.metric in SHARES, "bits": task.metric.startswith("bits_"),
        "bars": task.bars, "obstacles": task.obstacles(),
        "sets": task.sets, "name": groups.words({"task": task.name}, ["task"])[0].partition("=")[2],
    }  # fmt: skip


def _beside(task: Task, setting: costs.Setting, found: Findings) -> dict[str, Any]:
    """Which lines of costs stand beside which trainings."""
    paired = pairs(task, costs.lines(found.rows, setting))
    return {
        "task": task.title,
        "setting": setting.words(),
        "pairs": [[learnt.label, series.label] for learnt, series in paired],
    }
