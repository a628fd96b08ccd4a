"""HTML pieces: escaping, tables, and the frame of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape as _escape
from typing import Any

from attention_zoo.report.assets import script, style
from attention_zoo.report.cells import Table
from attention_zoo.report.fields import PLAIN
from attention_zoo.report.library import plotly_script
from attention_zoo.report.palette import PAIRS
from attention_zoo.report.summary import Summary

# Nothing may be loaded from anywhere: the browser itself refuses, were the page ever to ask.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def escape(text: str) -> str:
    """Text as HTML; a figure and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|[KMGT]iB|ms|s|µs|min|M|k)(?:\W|$))", "\u00a0", _escape(text))


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{escape(text)}</p>"


def bullets(items: Iterable[str], kind: str = "") -> str:
    keys = ' tabindex="0"' if kind in ("lead", "told") else ""  # which scroll where there is much
    return f"<ul{_class(kind)}{keys}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def warning(title: str, items: Sequence[str]) -> str:
    """A call-out; nothing for no items."""
    if not items:
        return ""
    return f'<div class="warn" role="note">{f"<b>{escape(title)}</b>" if title else ""}{bullets(items, "told")}</div>'


def section(key: str, title: str, *parts: str) -> str:
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _scroll(headers: Sequence[str]) -> str:
    """The beginning of what may be wider than its place: keys scroll it, too, and it says what it is."""
    said = ", ".join(header for header in headers if header)
    return f'<div class="scroll" tabindex="0" role="group" aria-label="Table: {escape(said)}">'


def table(content: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in content.headers)
    body = "".join(f"<tr>{_line(cells)}</tr>" for cells in content.cells)
    notes = paragraph("; ".join(content.notes), "note") if content.notes else ""
    return (
        f"{_scroll(content.headers)}<table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
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
    begin = _scroll(["mechanism", *(title for title, _ in content.groups)])
    return (
        f'{begin}<table><thead><tr class="groups"><td></td>{groups}</tr>'
        f'<tr><th scope="col">mechanism</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def page(title: str, body: str, data: Mapping[str, Any], *, live: bool = False) -> str:
    """The whole document: style, chart library, runs and scripts inlined.

    Args:
        body: what stands in it.
        data: what the scripts draw, see `data.dashboard`.
        live: whether it asks its server for what is new.
    """
    policy = f"{POLICY}; connect-src {chr(39)}self{chr(39)}" if live else POLICY
    settings = {"palette": PAIRS, "first": len(PLAIN), "live": live}
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style()}</style></head>\n<body>{body}\n"
        f"{_json('runs', data)}{_json('settings', settings)}"
        f"<script>{plotly_script()}</script>\n<script>{script()}</script></body></html>\n"
    )


def _json(key: str, value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script id="{key}" type="application/json">{text}</script>\n'
