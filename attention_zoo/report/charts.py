"""Charts as plotly figures, each with a title, units, a legend and the same figures as a table.

Colours are those of the light theme; the page swaps them for the dark one. Legends and titles are left to the page,
where they wrap on a phone; a legend entry switches the traces of its `legendgroup`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go

from attention_zoo.report import costs, patterns, units
from attention_zoo.report import rows as results
from attention_zoo.report.costs import MEMORY, RATE, STATE, TIME, Series, Setting
from attention_zoo.report.palette import BASELINE, BLANK, GRID, INK, MUTED, PAPER, Style, pick
from attention_zoo.results.row import Row

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FAILED = "did not finish"
OTHERWISE = "by resident set"


@dataclass
class Table:
    """Headers and cells, ready to be shown."""

    headers: list[str]
    cells: list[list[str]]
    notes: list[str] = field(default_factory=list)
    """What its marks mean."""

    def marked(self, notes: Iterable[str]) -> Table:
        return Table(self.headers, self.cells, [*self.notes, *notes])


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
    if series.baseline and series.label not in styles:
        return BASELINE[series.kernel]
    return pick(styles, series.label, series.backend)


def hover(*lines: str) -> str:
    """Text beside a point: plotly reads tags in it, so what rows say is escaped."""
    return "<br>".join(escape(line, quote=False) for line in lines if line)


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
    figure.update_xaxes(title_text=escape(x, quote=False))
    figure.update_yaxes(title_text=escape(y, quote=False))
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


def line_of(style: Style, width: float = 2) -> dict[str, Any]:
    return {"color": style.color, "width": width, "dash": style.dash}


def marker_of(style: Style, size: int = 9) -> dict[str, Any]:
    return {"color": style.color, "symbol": style.marker, "size": size, "line": {"width": 1.5, "color": style.color}}


def cost(setting: Setting, many: list[Series], styles: dict[str, Style], key: str, *, name: str) -> Chart | None:
    """One cost against length, both axes logarithmic. Cells that did not finish are crosses at the top."""
    title, unit = {
        TIME: ("Time against length", "seconds of one call (median)"),
        MEMORY: ("Memory against length", "peak bytes of tensors"),
        RATE: ("Speed against context", "tokens a second (median)"),
        STATE: ("State against context", "bytes carried to the next call"),
    }[key]
    words = costs.WORDS[key]
    other = [series for series in many if key == MEMORY and _resident(series)]
    values = [value for series in many for value in series.values(key).values()]
    values += [value for series in other for value in _resident(series).values()]
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
        mark = marker_of(style)
        common = {"name": series.label, "legendgroup": series.label, "hoverinfo": "text"}
        if found:
            figure.add_scatter(
                x=list(found), y=list(found.values()), mode="lines+markers", line=line_of(style), marker=mark,
                hovertext=[_said(series, length, words(value), _spread(series.rows[length], key))
                           for length, value in found.items()],
                error_y=_range(series, key, style), **common,
            )  # fmt: skip
        if series in other:
            figure.add_scatter(
                x=list(_resident(series)), y=list(_resident(series).values()), mode="lines+markers",
                line=line_of(style, 1) | {"dash": "dot"},
                marker=mark | {"symbol": f"{style.marker.removesuffix('-open')}-open-dot"},
                hovertext=[_said(series, length, words(value), OTHERWISE)
                           for length, value in _resident(series).items()], **common,
            )  # fmt: skip
        legend.append((series.label, style))
    for place, series in enumerate(failing):
        lost = series.failures()
        figure.add_scatter(
            x=list(lost), y=[10 ** (top - step * (place + 0.5))] * len(lost), mode="markers", name=series.label,
            legendgroup=series.label, hoverinfo="text", cliponaxis=False,
            marker={"symbol": "x-thin", "size": 10, "line": {"width": 2.5, "color": style_of(series, styles).color}},
            hovertext=[_said(series, length, results.why(row)) for length, row in lost.items()],
        )  # fmt: skip
    if other:
        legend.append((OTHERWISE, Style(MUTED, "circle-open-dot", "dot")))
    if failing:
        legend.append((FAILED, Style(MUTED, "x-thin", "none")))
    note = f"{setting.words()[0].upper()}{setting.words()[1:]}. Both axes logarithmic."
    if other:
        note += (
            f" Hollow with a dot: {OTHERWISE} of the process, since calls of that length are not observed tensor by "
            "tensor; not to be compared with the rest."
        )
    if failing:
        note += " A cross at the top: did not finish, or was predicted not to; its height means nothing."
    return Chart(f"{name}-{key}", title, note, figure, _cost_table(many, lengths, key), legend)


def _resident(series: Series) -> dict[int, float]:
    return {length: value for length, (value, method) in series.memory().items() if method == costs.RESIDENT}


def _said(series: Series, length: int, figure: str, more: str = "") -> str:
    return hover(series.label, f"{length:,} tokens: {figure}", more)


def _spread(row: Row, key: str) -> str:
    low, high = row.get("seconds_min"), row.get("seconds_max")
    if key != TIME or low is None or high is None:
        return ""
    return f"{units.seconds(low)} to {units.seconds(high)}, {row.get('repeats') or '?'} repeats"


def _range(series: Series, key: str, style: Style) -> dict[str, Any] | None:
    rows = [series.rows[length] for length in series.values(key)]
    if key != TIME or any(row.get(end) is None for row in rows for end in ("seconds_min", "seconds_max")):
        return None
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": style.color,
        "array": [row["seconds_max"] - row["seconds"] for row in rows],
        "arrayminus": [row["seconds"] - row["seconds_min"] for row in rows],
    }  # fmt: skip


def _cost_table(many: list[Series], lengths: list[int], key: str) -> Table:
    cells = [
        [series.label, *(series.said(key, length) if length in series.rows else "not planned" for length in lengths)]
        for series in many
    ]
    table = Table(["", *(f"{length:,} tokens" for length in lengths)], cells)
    return table if key != MEMORY else table.marked(costs.marks(many))


def picture(row: Row, style: Style, label: str) -> Chart:
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
    table = Table(["", label], [[key, value] for key, value in words.items()])
    return Chart(f"picture-{row['backend']}", label, said, figure, table, legend, square=True)


def all_costs(rows: Iterable[Row], styles: dict[str, Style]) -> list[tuple[Setting, list[Series], list[Chart]]]:
    """For each setting among the speed rows its lines and their two charts."""
    rows = list(rows)
    found = []
    for number, setting in enumerate(costs.settings(rows)):
        many = costs.lines(rows, setting)
        drawn = [cost(setting, many, styles, key, name=f"cost{number}") for key in costs.told(setting)]
        found.append((setting, many, [chart for chart in drawn if chart is not None]))
    return found
