"""The page's own style and scripts: files of `static`, inlined, so that a report is one file that needs no network."""

from __future__ import annotations

from functools import cache

from attention_zoo.report.library import STATIC

STYLES = ("page", "dashboard", "panel", "narrow", "paper")
SCRIPTS = (
    "dom", "words", "runs", "state", "select", "link", "look", "facets", "columns", "table", "gather", "points",
    "figure", "costs", "tasks", "learnt", "courses", "distance", "lengths", "picture", "seen", "heads", "details",
    "legend", "live", "main",
)  # fmt: skip
"""In the order in which they need each other."""


@cache
def style() -> str:
    return "".join((STATIC / f"{name}.css").read_text("utf-8") for name in STYLES)


@cache
def script() -> str:
    return '"use strict";\n' + "".join((STATIC / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
