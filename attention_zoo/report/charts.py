"""Charts as plotly figures, each with a title, units, a legend and the same figures as a table.

Colours are those of the light theme; the page swaps them for the dark one. Legends and titles are left to the page,
where they wrap on a phone; a legend entry switches the traces of its `legendgroup`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from attention_zoo.report import costs, patterns, units
from attention_zoo.report import rows as results
from attention_zoo.report.costs import MEMORY, RATE, STATE, TIME, Series, Setting
from attention_zoo.report.palette import BASELINE, BLANK, GRID, INK, MUTED, PAPER, Style
from attention_zoo.report.quality import LEARNT, METRIC_WORDS, Learnt, Task, spoken
from attention_zoo.report.rows import Row

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FAILED = "did not finish"
SHARE_AXIS = {
    "range": [-0.03, 1.05], "tickvals": [0, 0.25, 0.5, 0.75, 1], "ticktext": ["0 %", "25 %", "50 %", "75 %", "100 %"]
}  # fmt: skip


@dataclass
class Table:
    """Headers and cells, ready to be shown."""

    headers: list[str]
    cells: list[list[str]]


@dataclass
class Chart:
    """One chart with all that belongs to it.

    Fields:
        key: unique in the page, fit for an id.
        title, note: above the chart; the note says what is drawn and how to read it.
        legend: (label = legendgroup, style) in drawing order.
        table: the same figures in text.
        square: whether height follows width (pictures of patterns).
    """

    key: str
    title: str
    note: str
    figure: go.Figure
    table: Table
    legend: list[tuple[str, Style]] = field(default_factory=list)
    square: bool = False


def style_of(series: Series, styles: dict[str, Style]) -> Style:
    return BASELINE[series.kernel] if series.baseline else styles[series.backend]


def blank_figure(x: str, y: str, **layout: Any) -> go.Figure:
    """A figure in the style of the page, with titles on both axes."""
    axis: dict[str, Any] = {
        "gridcolor": GRID, "linecolor": GRID, "tickcolor": GRID, "zeroline": False, "automargin": True,
        "title": {"font": {"size": 12, "color": MUTED}, "standoff": 8}, "fixedrange": False,
    }  # fmt: skip
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        showlegend=False,
        hovermode="closest",
        hoverlabel={"bgcolor": PAPER, "bordercolor": GRID, "font": {"color": INK, "family": FONT, "size": 12}},
        xaxis=axis,
        yaxis=axis,
        **layout,
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def log_axis(
    update: Any, values: Sequence[float], words: Any, *, binary: bool, pad: float = 0.08
) -> tuple[float, float]:
    """Explicit ticks on a logarithmic axis that holds all values; returns its range in decades."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max((high - low) * pad, 0.05)
    ticks = [
        t
        for t in units.log_ticks(min(values), max(values), binary=binary)
        if low - room <= math.log10(t) <= high + room
    ]
    update(
        type="log",
        tickvals=ticks,
        ticktext=[units.whole(words(t)) for t in ticks],
        range=[low - room, high + room],
        minor_ticks="",
    )
    return low - room, high + room


def _line(style: Style, width: float = 2) -> dict[str, Any]:
    return {"color": style.color, "width": width, "dash": style.dash}


def marker_of(style: Style, size: int = 9) -> dict[str, Any]:
    return {"color": style.color, "symbol": style.marker, "size": size, "line": {"width": 1.5, "color": style.color}}


def cost(setting: Setting, many: list[Series], styles: dict[str, Style], key: str, *, name: str) -> Chart | None:
    """One cost against length, both axes logarithmic. Cells that did not finish are crosses at the top."""
    title, unit, words = {
        TIME: ("Time against length", "seconds of one call (median)", units.seconds),
        MEMORY: ("Memory against length", "peak bytes of tensors", units.size),
        RATE: ("Speed against context", "tokens a second (median)", units.millions),
        STATE: ("State against context", "bytes carried to the next call", units.size),
    }[key]
    values = [value for series in many for value in series.values(key).values()]
    lengths = sorted({length for series in many for length in series.rows})
    if not values:
        return None
    figure = blank_figure("length in tokens", unit)
    figure.update_xaxes(
        type="log", tickvals=lengths, ticktext=[f"{length:,}" for length in lengths],
        range=[math.log10(lengths[0]) - 0.06, math.log10(lengths[-1]) + 0.06],
    )  # fmt: skip
    failing = [series for series in many if series.failures()]
    low, high = log_axis(figure.update_yaxes, values, words, binary=key in (MEMORY, STATE))
    step = (high - low) * 0.05
    top = high + step * len(failing)
    figure.update_yaxes(range=[low, top])
    legend = []
    for series in many:
        style = style_of(series, styles)
        found = series.values(key)
        hover = [f"{series.label}<br>{length:,} tokens: {words(value)}{_spread(series.rows[length], key)}"
                 for length, value in found.items()]  # fmt: skip
        if found:
            figure.add_scatter(
                x=list(found), y=list(found.values()), mode="lines+markers", name=series.label,
                legendgroup=series.label, line=_line(style), marker=marker_of(style), hovertext=hover, hoverinfo="text",
                error_y=_range(series, key, style),
            )  # fmt: skip
        legend.append((series.label, style))
    for place, series in enumerate(failing):
        lost = series.failures()
        figure.add_scatter(
            x=list(lost), y=[10 ** (top - step * (place + 0.5))] * len(lost), mode="markers", name=series.label,
            legendgroup=series.label, hoverinfo="text", cliponaxis=False,
            marker={"symbol": "x-thin", "size": 10, "line": {"width": 2.5, "color": style_of(series, styles).color}},
            hovertext=[f"{series.label}<br>{length:,} tokens: {results.why(row)}" for length, row in lost.items()],
        )  # fmt: skip
    if failing:
        legend.append((FAILED, Style(MUTED, "x-thin", "none")))
    note = f"{setting.words()[0].upper()}{setting.words()[1:]}. Both axes logarithmic."
    if failing:
        note += " A cross at the top: did not finish, or was predicted not to; its height means nothing."
    return Chart(f"{name}-{key}", title, note, figure, _cost_table(many, lengths, key, words), legend)


def _spread(row: Row, key: str) -> str:
    if key != TIME or row.get("seconds_min") is None:
        return ""
    return f"<br>{units.seconds(row['seconds_min'])} to {units.seconds(row['seconds_max'])}, {row['repeats']} repeats"


def _range(series: Series, key: str, style: Style) -> dict[str, Any] | None:
    rows = [series.rows[length] for length in series.values(key)]
    if key != TIME or any(row.get("seconds_min") is None for row in rows):
        return None
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": style.color,
        "array": [row["seconds_max"] - row["seconds"] for row in rows],
        "arrayminus": [row["seconds"] - row["seconds_min"] for row in rows],
    }  # fmt: skip


def _cost_table(many: list[Series], lengths: list[int], key: str, words: Any) -> Table:
    cells = []
    for series in many:
        found = series.values(key)
        line = [series.label]
        for length in lengths:
            row = series.rows.get(length)
            if row is None:
                line.append("not planned")
            else:
                line.append(words(found[length]) if length in found else results.status(row))
        cells.append(line)
    return Table(["", *(f"{length:,} tokens" for length in lengths)], cells)


def pareto(task: Task, many: list[Series], length: int, styles: dict[str, Style], key: str) -> Chart | None:
    """Quality against cost at one length. A front is drawn only where ranking is allowed."""
    words, axis, noun = {
        TIME: (units.seconds, "seconds of one call", "time"),
        MEMORY: (units.size, "peak bytes", "memory"),
    }[key]
    points: list[tuple[Learnt, Series, float]] = []
    for learnt in task.learnt:
        for series in many:
            value = series.values(key).get(length)
            if learnt.rows and series.backend == learnt.backend and value is not None:
                points.append((learnt, series, value))
    if not points:
        return None
    better = "lower" if task.lower_is_better else "higher"
    figure = blank_figure(
        f"{axis} at {length:,} tokens (lower is better)", f"{METRIC_WORDS[task.metric]} ({better} is better)"
    )
    log_axis(figure.update_xaxes, [value for *_, value in points], words, binary=key == MEMORY, pad=0.12)
    legend, cells = [], []
    for learnt, series, value in points:
        style = style_of(series, styles)
        label = series.label if learnt.label == learnt.backend else f"{series.label}: {learnt.label}"
        quality = learnt.mean or 0.0
        error = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 4, "color": style.color,
                 "array": [max(learnt.values) - quality], "arrayminus": [quality - min(learnt.values)]}  # fmt: skip
        figure.add_scatter(
            x=[value], y=[quality], mode="markers", name=label, legendgroup=label, marker=marker_of(style, 13),
            error_y=error if learnt.seeds > 1 else None, hoverinfo="text",
            hovertext=[f"{label}<br>{words(value)}<br>{learnt.words()} {METRIC_WORDS[task.metric]}"],
        )  # fmt: skip
        legend.append((label, Style(style.color, style.marker, "none")))
        cells.append([label, words(value), learnt.words(), str(learnt.seeds)])
    if not task.obstacles():
        front = _front([(value, learnt.mean or 0.0) for learnt, _, value in points], task.lower_is_better)
        figure.add_scatter(
            x=[x for x, _ in front], y=[y for _, y in front], mode="lines",
            line={"color": MUTED, "width": 1, "shape": "hv"},
            hoverinfo="skip", legendgroup="front", name="front",
        )  # fmt: skip
        legend.append(("front", Style(MUTED, "none")))
    if task.metric == "accuracy":
        figure.update_yaxes(tickformat=".0%")
    note = f"{task.title}, beside {noun} of one call at {length:,} tokens."
    note += "".join(f" {obstacle[0].upper()}{obstacle[1:]}." for obstacle in task.obstacles())
    table = Table(["", axis, METRIC_WORDS[task.metric], "seeds"], cells)
    return Chart(f"pareto-{_slug(task)}-{key}", f"Quality against {noun}", note, figure, table, legend)


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
    share = metric and task.metric == "accuracy"
    factor = 1 / math.log(2) if bits and not metric else 1.0
    unit = METRIC_WORDS[task.metric] if metric else "loss in bits per byte" if bits else "loss in nats"
    figure = blank_figure(x, unit)
    if share:
        figure.update_yaxes(**SHARE_AXIS)
    legend, cells = [], []
    for learnt in task.learnt:
        drawn = [row for row in learnt.rows if row.get(field)]
        style = styles[learnt.backend]
        for row in drawn:
            xs = [point[0] for point in row[field]]
            ys = [point[1] * factor for point in row[field]]
            said = [units.percent(y) if share else units.fixed(y, 3) for y in ys]
            figure.add_scatter(
                x=xs, y=ys, mode="lines" if len(xs) > 1 else "markers", name=learnt.label, legendgroup=learnt.label,
                line=_line(style, 2 if len(drawn) == 1 else 1.2), marker=marker_of(style, 6), hoverinfo="text",
                hovertext=[f"{learnt.label}, seed {row.get('seed')}<br>{x} {a:,}: {b}" for a, b in zip(xs, said)],
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
    if task.metric != "accuracy" or not task.sets:
        return None
    figure = blank_figure("evaluation set", "accuracy of recalled values")
    figure.update_yaxes(**SHARE_AXIS)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[spoken(name) for name in task.sets])
    legend, cells = [], []
    for learnt in (each for each in task.learnt if each.rows):
        style = styles[learnt.backend]
        found = {spoken(name): value for name in task.sets if (value := learnt.on(name)) is not None}
        figure.add_scatter(
            x=list(found), y=list(found.values()), mode="lines+markers", name=learnt.label, legendgroup=learnt.label,
            line=_line(style, 1.5), marker=marker_of(style, 11), hoverinfo="text", cliponaxis=False,
            hovertext=[f"{learnt.label}<br>{name}: {units.percent(value)}" for name, value in found.items()],
        )  # fmt: skip
        legend.append((learnt.label, style))
        cells.append([learnt.label, *(units.percent(found.get(spoken(name))) for name in task.sets), str(learnt.seeds)])
    figure.add_hline(y=LEARNT, line={"color": MUTED, "width": 1, "dash": "dot"})
    note = f"{task.title}. Dotted: the {LEARNT:.0%} that full attention must reach before others are judged by it."
    table = Table(["", *map(spoken, task.sets), "seeds"], cells)
    return Chart(f"accuracy-{_slug(task)}", "Recall accuracy", note, figure, table, legend)


def picture(row: Row, style: Style) -> Chart:
    """Which keys each query sees; memory that carries no gradient is paler."""
    pairs = patterns.pairs_of(row)
    length = len(pairs)
    kinds = sorted({kind for line in pairs for kind in line} | {patterns.UNSEEN, patterns.GRADIENT})
    shades = {patterns.UNSEEN: BLANK, patterns.VALUE: MUTED, patterns.GRADIENT: style.color}
    steps: list[list[Any]] = []
    for number, kind in enumerate(kinds):
        steps += [[number / len(kinds), shades[kind]], [(number + 1) / len(kinds), shades[kind]]]
    place = {kind: number for number, kind in enumerate(kinds)}
    figure = blank_figure("key", "query")
    figure.add_heatmap(
        z=[[place[kind] for kind in line] for line in pairs], colorscale=steps, zmin=-0.5, zmax=len(kinds) - 0.5,
        showscale=False, xgap=0, ygap=0, hovertemplate="query %{y}, key %{x}<extra></extra>",
    )  # fmt: skip
    ticks = list(range(0, length, max(8, length // 3 // 8 * 8)))
    figure.update_xaxes(tickvals=ticks, showgrid=False, constrain="domain", range=[-0.5, length - 0.5])
    figure.update_yaxes(tickvals=ticks, showgrid=False, range=[length - 0.5, -0.5], scaleanchor="x", constrain="domain")
    said = ", ".join(f"{key}={value}" for key, value in results.options(row).items()) or "default options"
    told = patterns.told(row)
    words = {
        "share of the causal half": units.percent(told["share of the causal half"]),
        "keys a query, mean": units.fixed(told["keys a query, mean"], 1),
        "keys a query, most": units.count(told["keys a query, most"]),
        "farthest key seen": f"{told['farthest key seen']} back",
        "pairs without gradient": units.count(told["pairs without gradient"]),
    }
    legend = [("seen", Style(style.color, "square", "none"))]
    if patterns.VALUE in kinds:
        legend.append(("no gradient", Style(MUTED, "square", "none")))
    table = Table(["", row["backend"]], [[key, value] for key, value in words.items()])
    return Chart(f"picture-{row['backend']}", row["backend"], said, figure, table, legend, square=True)


def all_costs(rows: Iterable[Row], styles: dict[str, Style]) -> list[tuple[Setting, list[Series], list[Chart]]]:
    """For each setting among the speed rows its lines and their two charts."""
    rows = list(rows)
    found = []
    for number, setting in enumerate(costs.settings(rows)):
        many = costs.lines(rows, setting)
        drawn = [cost(setting, many, styles, key, name=f"cost{number}") for key in costs.told(setting)]
        found.append((setting, many, [chart for chart in drawn if chart is not None]))
    return found
