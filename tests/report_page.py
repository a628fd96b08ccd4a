"""What stands in a page of the report: its text, and the data that its scripts draw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attention_zoo.report import Findings, build_report
from attention_zoo.report.build import sections
from attention_zoo.report.data import dashboard


def page_of(rows: Iterable[dict[str, Any]], folder: Path) -> str:
    return build_report(rows, folder / "report.html").read_text()


def text_of(page: str) -> str:
    """What a reader sees: the body without scripts and tags."""
    body = page[page.index("<body>") : page.index('<script id="runs"')]
    return re.sub(r"<[^>]+>", " ", body).replace("\u00a0", " ")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="runs" type="application/json">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found.group(1))


def html_of(rows: Iterable[dict[str, Any]]) -> str:
    """The sections in words, without a page around them."""
    return "".join(sections(Findings.of(rows)).values())


def drawn(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The data alone, without a page around it."""
    return dashboard(Findings.of(rows))


def ask(data: dict[str, Any], run: dict[str, Any], name: str) -> str | None:
    """What a run says under the name of a field."""
    place = [field for field, _ in data["fields"]].index(name)
    value = run["f"][place] if place < len(run["f"]) else -1
    return None if value < 0 else data["fields"][place][1][value]
