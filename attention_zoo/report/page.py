"""HTML pieces: escaping, tables, charts with their legends, and the frame of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape as _escape

from plotly.offline import get_plotlyjs

from attention_zoo.report.assets import SCRIPT, STYLE
from attention_zoo.report.charts import Chart, Table
from attention_zoo.report.palette import DARK, Style
from attention_zoo.report.summary import Summary

# Nothing may be loaded from anywhere: the browser itself refuses, were the page ever to ask.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

_SHAPES = {
    "circle": '<circle cx="14" cy="7" r="4"/>',
    "square": '<rect x="10" y="3" width="8" height="8"/>',
    "diamond": '<path d="M14 2l5 5-5 5-5-5z"/>',
    "triangle-up": '<path d="M14 2.5l5 8.5H9z"/>',
    "triangle-down": '<path d="M14 11.5l5-8.5H9z"/>',
    "hexagon": '<path d="M14 2.2l4.3 2.4v4.8L14 11.8 9.7 9.4V4.6z"/>',
    "star": '<path d="M14 2l1.4 3.4 3.6.3-2.8 2.3.9 3.6-3.1-2-3.1 2 .9-3.6L9 5.7l3.6-.3z"/>',
    "cross": '<path d="M12.4 2.5h3.200v2.900h2.900v3.200h-2.900v2.900h-3.200V8.600H9.500V5.400h2.900z"/>',
    "x-thin": '<path d="M10 3l8 8M18 3l-8 8" stroke="currentColor" stroke-width="2"/>',
    "none": "",
}
_DASHES = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1.5 2"}


def escape(text: str) -> str:
    """Text as HTML; a figure and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|[KMGT]iB|ms|s|µs|min|M|k)(?:\W|$))", "\u00a0", _escape(text))


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>"


def bullets(items: Iterable[str], kind: str = "") -> str:
    return f"<ul{_class(kind)}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def warning(title: str, items: Sequence[str]) -> str:
    """A call-out; nothing for no items."""
    if not items:
        return ""
    return f'<div class="warn" role="note">{f"<b>{escape(title)}</b>" if title else ""}{bullets(items)}</div>'


def section(key: str, title: str, *parts: str) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def table(content: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in content.headers)
    body = "".join(f"<tr>{_line(cells)}</tr>" for cells in content.cells)
    notes = paragraph("; ".join(content.notes), "note") if content.notes else ""
    return (
        f'<div class="scroll"><table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{notes}"
    )


def _line(cells: Sequence[str], edges: Sequence[int] = ()) -> str:
    first = f'<th scope="row">{escape(cells[0])}</th>'
    rest = (f"<td{_class('edge' if n in edges else '')}>{escape(cell)}</td>" for n, cell in enumerate(cells[1:]))
    return first + "".join(rest)


def summary_table(content: Summary) -> str:
    edges, start = [], 0
    for _, columns in content.groups:
        edges.append(start)
        start += len(columns)
    groups = "".join(
        f'<th scope="colgroup" class="edge" colspan="{len(columns)}">{escape(title)}</th>'
        for title, columns in content.groups
    )
    flat = [column for _, columns in content.groups for column in columns]
    head = "".join(
        f'<th scope="col"{_class("edge" if n in edges else "")}>{escape(column)}</th>' for n, column in enumerate(flat)
    )
    body = "".join(f"<tr>{_line([name, *cells], edges)}</tr>" for name, cells in zip(content.names, content.cells))
    return (
        f'<div class="scroll"><table><thead><tr class="groups"><th></th>{groups}</tr>'
        f'<tr><th scope="col">mechanism</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def swatch(style: Style) -> str:
    """The sign of a line in a legend: its dash and its marker."""
    line = ""
    if style.dash != "none":
        line = f'<path d="M1 7h26" stroke="currentColor" stroke-width="2" stroke-dasharray="{_DASHES[style.dash]}"/>'
    hollow = "-open" in style.marker
    fill = 'fill="var(--paper)" stroke="currentColor" stroke-width="1.6"' if hollow else 'fill="currentColor"'
    shape = _SHAPES[style.marker.partition("-open")[0]]
    if style.marker.endswith("-dot"):
        shape += '<circle cx="14" cy="7" r="1" fill="currentColor"/>'
    return (
        f'<svg width="28" height="14" aria-hidden="true" data-color="{style.color}">{line}<g {fill}>{shape}</g></svg>'
    )


def chart(content: Chart) -> str:
    """A figure with title, note, legend, plot and its numbers."""
    if content.square:
        legend = "".join(f"<span>{swatch(style)}{escape(label)}</span>" for label, style in content.legend)
    else:
        legend = "".join(
            f'<button type="button" aria-pressed="true" data-figure="{_escape(content.key)}" '
            f'data-group="{_escape(label)}">{swatch(style)}{escape(label)}</button>'
            for label, style in content.legend
        )
    return (
        f"<figure{_class('square' if content.square else '')}><figcaption><h3>{escape(content.title)}</h3>"
        f"{paragraph(content.note)}</figcaption>"
        f'<div class="legend">{legend}</div>'
        f'<div class="plot" data-figure="{_escape(content.key)}" role="img" aria-label="{escape(content.title)}"></div>'
        f"<details><summary>Numbers</summary>{table(content.table)}</details></figure>"
    )


def charts(many: Sequence[Chart]) -> str:
    """Charts side by side where the screen is wide."""
    kind = "pictures" if many and all(each.square for each in many) else "charts"
    return f'<div class="{kind}">{"".join(chart(each) for each in many)}</div>' if many else ""


def page(title: str, body: str, drawn: Sequence[Chart]) -> str:
    """The whole document: style, plotly.js, figures and script inlined."""
    figures = ",".join(f"{json.dumps(each.key)}:{each.figure.to_json()}" for each in drawn)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main>\n"
        f'<script id="figures" type="application/json">{_safe("{" + figures + "}")}</script>\n'
        f'<script id="dark" type="application/json">{_safe(json.dumps(DARK))}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script></body></html>\n"
    )


def _safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")
