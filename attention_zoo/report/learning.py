"""Charts of what the mechanisms learnt: quality beside cost, courses of training, recall."""

from __future__ import annotations

import math
from html import escape

from attention_zoo.report import units
from attention_zoo.report.charts import Chart, Table, blank_figure, hover, line_of, log_axis, marker_of, style_of
from attention_zoo.report.costs import MEMORY, TIME, Series
from attention_zoo.report.palette import MUTED, Style, pick
from attention_zoo.report.quality import LEARNT, SHARES, Learnt, Task, metric_words, spoken
from attention_zoo.results.row import Row

SHARE_AXIS = {
    "range": [-0.03, 1.05], "tickvals": [0, 0.25, 0.5, 0.75, 1], "ticktext": ["0 %", "25 %", "50 %", "75 %", "100 %"]
}  # fmt: skip


def pareto(task: Task, many: list[Series], length: int, styles: dict[str, Style], key: str) -> Chart | None:
    """Quality against cost at one length. A front is drawn only where ranking is allowed."""
    words, axis, noun = {
        TIME: (units.seconds, "seconds of one call", "time"),
        MEMORY: (units.size, "peak bytes", "memory"),
    }[key]
    points = [
        (learnt, series, value)
        for learnt, series in _pairs(task, many)
        if (value := series.values(key).get(length)) is not None
    ]
    if not points:
        return None
    better = "lower" if task.lower_is_better else "higher"
    figure = blank_figure(f"{axis} at {length:,} tokens (lower is better)", f"{task.brief} ({better} is better)")
    log_axis(figure.update_xaxes, [value for *_, value in points], words, binary=key == MEMORY, pad=0.12)
    legend, cells = [], []
    for learnt, series, value in points:
        style = (
            style_of(series, styles)
            if learnt.label == learnt.backend
            else pick(styles, learnt.label, series.label, series.backend)
        )
        alone = learnt.label in (learnt.backend, series.label)
        label = series.label if alone else f"{series.label}: {learnt.label}"
        quality = learnt.mean or 0.0
        error = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": style.color,
                 "array": [max(learnt.values) - quality], "arrayminus": [quality - min(learnt.values)]}  # fmt: skip
        figure.add_scatter(
            x=[value], y=[quality], mode="markers", name=label, legendgroup=label, marker=marker_of(style, 13),
            error_y=error if learnt.seeds > 1 else None, hoverinfo="text",
            hovertext=[hover(label, words(value), f"{learnt.words()} {metric_words(task.metric)}")],
        )  # fmt: skip
        legend.append((label, Style(style.color, style.marker, "none")))
        cells.append([label, words(value), learnt.words(), str(learnt.seeds)])
    if not task.obstacles() and len({tuple(sorted(series.place.items())) for _, series, _ in points}) == 1:
        front = _front([(value, learnt.mean or 0.0) for learnt, _, value in points], task.lower_is_better)
        figure.add_scatter(
            x=[x for x, _ in front], y=[y for _, y in front], mode="lines",
            line={"color": MUTED, "width": 1, "shape": "hv"},
            hoverinfo="skip", legendgroup="front", name="front",
        )  # fmt: skip
        legend.append(("front", Style(MUTED, "none")))
    if task.metric in SHARES:
        figure.update_yaxes(tickformat=".0%")
    note = f"{task.title}: {task.judged}, beside {noun} of one call at {length:,} tokens."
    bare = dict.fromkeys(each.label for each in task.learnt if each.rows and each not in [point[0] for point in points])
    note += f" Not drawn, since no cost of theirs was measured there: {', '.join(bare)}." if bare else ""
    note += "".join(f" {obstacle[0].upper()}{obstacle[1:]}." for obstacle in task.obstacles())
    table = Table(["", axis, metric_words(task.metric), "seeds"], cells)
    return Chart(f"pareto-{_slug(task)}-{key}", f"Quality against {noun}", note, figure, table, legend)


def _pairs(task: Task, many: list[Series]) -> list[tuple[Learnt, Series]]:
    """What was learnt beside what it costs: of the same backend, and where there are several groups or lines of it,
    with the same options and from the same file. Who reads less than others has no cost here: it is that of its budget.
    """
    found = []
    whole = [each for each in task.learnt if each.rows and not each.reads_less]
    for learnt in whole:
        mine = [series for series in many if series.backend == learnt.backend]
        if len({series.place.get("file") for series in many}) > 1:
            mine = [series for series in mine if series.place.get("file") == dict(learnt.group.place).get("file")]
        options = {each.group.options for each in whole if each.backend == learnt.backend}
        if len(options | {series.group.options for series in mine}) > 2:
            # one set of options for trainings and one for costs may be the same in two ways of writing; more may not
            own = dict(learnt.group.options)
            mine = [s for s in mine if s.group.options and dict(s.group.options).items() <= own.items()]
        found += [(learnt, series) for series in mine]
    return found


def _front(points: list[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: cheapest first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def _slug(task: Task) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{task.name}-{task.seq_len}")


def trajectory(
    task: Task, styles: dict[str, Style], field: str, *, x: str, title: str, note: str, metric: bool = False
) -> Chart | None:
    """A curve that every run holds as [[x, value], ...]: one line a seed.

    Args:
        field: of the rows; its values are losses in nats, or with `metric` those of the task's main metric.
    """
    bits = task.metric == "bits_per_byte"
    share = metric and task.metric in SHARES
    factor = 1 / math.log(2) if bits and not metric else 1.0
    unit = task.brief if metric else "loss in bits per byte" if bits else "loss in nats"
    figure = blank_figure(x, unit)
    if share:
        figure.update_yaxes(**SHARE_AXIS)
    legend, cells = [], []
    for learnt in task.learnt:
        drawn = [row for row in learnt.rows if row.get(field)]
        style = pick(styles, learnt.label, learnt.backend)
        for row in drawn:
            xs = [point[0] for point in row[field]]
            ys = [point[1] * factor for point in row[field]]
            said = [units.percent(y) if share else units.fixed(y, 3) for y in ys]
            figure.add_scatter(
                x=xs, y=ys, mode="lines" if len(xs) > 1 else "markers", name=learnt.label, legendgroup=learnt.label,
                line=line_of(style, 2 if len(drawn) == 1 else 1.2), marker=marker_of(style, 6), hoverinfo="text",
                hovertext=[hover(f"{learnt.label}, seed {row.get('seed')}", f"{x} {a:,}: {b}")
                           for a, b in zip(xs, said)],
            )  # fmt: skip
            picks = sorted({round(i * (len(xs) - 1) / 5) for i in range(6)})
            cells.append([learnt.label, str(row.get("seed")), "; ".join(f"{xs[i]:,}: {said[i]}" for i in picks)])
        if drawn:
            legend.append((learnt.label, Style(style.color, "none", style.dash)))
    if not cells:
        return None
    table = Table(["", "seed", f"{x}: {unit}"], cells)
    return Chart(f"{field}-{_slug(task)}", title, note, figure, table, legend)


def accuracy(task: Task, styles: dict[str, Style]) -> Chart | None:
    """Accuracy on every evaluation set, with the bar that full attention must clear."""
    if task.metric not in SHARES or not task.sets:
        return None
    figure = blank_figure("evaluation set", metric_words(task.metric))
    figure.update_yaxes(**SHARE_AXIS)
    sets = {name: escape(spoken(name), quote=False) for name in task.sets}
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(sets.values()))
    legend, cells = [], []
    for learnt in (each for each in task.learnt if each.rows):
        style = pick(styles, learnt.label, learnt.backend)
        found = {sets[name]: value for name in task.sets if (value := learnt.on(name)) is not None}
        figure.add_scatter(
            x=list(found), y=list(found.values()), mode="lines+markers", name=learnt.label, legendgroup=learnt.label,
            line=line_of(style, 1.5), marker=marker_of(style, 11), hoverinfo="text", cliponaxis=False,
            hovertext=[hover(learnt.label) + f"<br>{name}: {units.percent(value)}" for name, value in found.items()],
        )  # fmt: skip
        legend.append((learnt.label, style))
        cells.append([learnt.label, *(units.percent(found.get(sets[name])) for name in task.sets), str(learnt.seeds)])
    figure.add_hline(y=LEARNT, line={"color": MUTED, "width": 1, "dash": "dot"})
    note = f"{task.title}. Dotted: the {LEARNT:.0%} that full attention must reach before others are judged by it."
    if task.bar is not None:
        figure.add_hline(y=task.bar[1], line={"color": MUTED, "width": 1, "dash": "dash"})
        note += f" Dashed: {task.bar[0]}, {units.percent(task.bar[1])}."
    table = Table(["", *map(spoken, task.sets), "seeds"], cells)
    return Chart(
        f"accuracy-{_slug(task)}",
        f"{metric_words(task.metric).capitalize()} by evaluation set",
        note,
        figure,
        table,
        legend,
    )


def by_group(task: Task, styles: dict[str, Style], name: str) -> Chart | None:
    """What was answered well by where the evidence stands: one line a group of runs, the mean over its seeds.

    Args:
        name: of the rows' groups, such as "distance".
    """
    lower = task.lower_is_better
    factor = 1 / math.log(2) if task.metric.startswith("bits_") else 1.0
    unit = ("loss in bits" if factor != 1.0 else "loss in nats") if lower else "accuracy"
    figure = blank_figure(spoken(name), unit)
    if not lower:
        figure.update_yaxes(**SHARE_AXIS)
    legend, cells = [], []
    groups = sorted({point[0] for each in task.learnt for row in each.rows for point in _of_group(row, name)})
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[f"{int(group):,}" for group in groups])
    for learnt in task.learnt:
        found: dict[float, list[float]] = {}
        for row in learnt.rows:
            for group, hit, loss, _ in _of_group(row, name):
                found.setdefault(group, []).append(loss * factor if lower else hit)
        if not found:
            continue
        style = pick(styles, learnt.label, learnt.backend)
        means = {group: sum(found[group]) / len(found[group]) for group in sorted(found)}
        said = [units.fixed(value, 3) if lower else units.percent(value) for value in means.values()]
        words = [f"{int(group):,}" for group in means]
        figure.add_scatter(
            x=words, y=list(means.values()), mode="lines+markers", name=learnt.label, legendgroup=learnt.label,
            line=line_of(style, 1.5), marker=marker_of(style, 8), hoverinfo="text", cliponaxis=False,
            hovertext=[hover(learnt.label, f"{spoken(name)} {a}: {b}") for a, b in zip(words, said)],
        )  # fmt: skip
        legend.append((learnt.label, style))
        cells.append([learnt.label, "; ".join(f"{a}: {b}" for a, b in zip(words, said))])
    if not cells:
        return None
    note = f"{task.title}, on {task.main}: a name is the largest of its group."
    return Chart(f"group-{name}-{_slug(task)}", f"By {spoken(name)}", note, figure, Table(["", unit], cells), legend)


def read(task: Task) -> list[str]:
    """What the models said of themselves while they learnt: the last words of the names, each once."""
    names = (name for each in task.learnt for row in each.rows for name in row.get("readings") or {})
    return list(dict.fromkeys(map(_last, names)))


def readings(task: Task, styles: dict[str, Style], what: str) -> Chart | None:
    """What parts of a model said of themselves while it learnt, such as spans: a line for each head of each layer.

    Args:
        what: the last word of the names that are drawn.
    """
    figure = blank_figure("step", spoken(what))
    legend, cells = [], []
    for learnt in task.learnt:
        style, drawn = pick(styles, learnt.label, learnt.backend), False
        for row in learnt.rows:
            places = {k.rpartition(".")[0]: v for k, v in (row.get("readings") or {}).items() if _last(k) == what}
            for layer, points in enumerate(places.values(), 1):
                steps, heads = [point[0] for point in points], list(zip(*(point[1:] for point in points)))
                for head, values in enumerate(heads, 1):
                    who = f"{learnt.label}, seed {row.get('seed')}, layer {layer}, head {head}"
                    figure.add_scatter(
                        x=steps, y=list(values), mode="lines" if len(steps) > 1 else "markers", name=learnt.label,
                        legendgroup=learnt.label, line=line_of(style, 1.2), marker=marker_of(style, 5),
                        hoverinfo="text",
                        hovertext=[hover(who, f"step {a:,}: {units.fixed(b, 3)}") for a, b in zip(steps, values)],
                    )  # fmt: skip
                last = ", ".join(units.fixed(values[-1], 3) for values in heads)
                cells.append([learnt.label, str(row.get("seed")), str(layer), last])
                drawn = True
        if drawn:
            legend.append((learnt.label, Style(style.color, "none", style.dash)))
    if not cells:
        return None
    note = f"{task.title}: one line for each head of each layer, as read at the evaluations."
    table = Table(["", "seed", "layer", f"{spoken(what)} at the end, by head"], cells)
    return Chart(f"readings-{what}-{_slug(task)}", spoken(what).capitalize(), note, figure, table, legend)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _of_group(row: Row, name: str) -> list[list[float]]:
    return (row.get("by_group") or {}).get(name) or []
