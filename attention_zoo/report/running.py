"""Trainings that have not ended: what their folders say so far, as rows of status "running".

Such a row is for the dashboard of a sweep that is being watched and for nothing else: no figure of it is a result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, read_jsonl
from attention_zoo.report.rows import clean
from attention_zoo.results.row import Row

METRICS, RESULT = "metrics.jsonl", "result.json"
RUNNING = "running"


def running(folders: Iterable[Path]) -> list[Row]:
    """A row for each training beneath some folders that has begun and has left no result."""
    found = {path.resolve(): None for folder in folders if folder.is_dir() for path in _begun(folder)}
    return [row for path in found if (row := _row(path)) is not None]


def _begun(folder: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if METRICS in names and RESULT not in names:
            yield Path(place)


def _row(folder: Path) -> Row | None:
    try:
        lines = [clean(line) for line in read_jsonl(folder / METRICS, lambda said: None)]
    except (Damaged, OSError, ValueError):
        return None  # it is being written, or moved away: the next look sees it
    curve = [point for line in lines if (point := _point(line, "train/loss")) is not None]
    if not curve:
        return None
    what, _, name = folder.name.rpartition("-")
    task, _, backend = what.partition("-")
    rates = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    return {
        "kind": "quality", "status": RUNNING, "backend": backend or folder.name, "task": task or None,
        "id": name or folder.name, "curve": curve, "steps": curve[-1][0],
        "tokens_per_second": rates[-1] if rates else None,
        "error": f"step {curve[-1][0]:,}, loss {curve[-1][1]:.4g}", "config": {"folder": str(folder)},
    }  # fmt: skip


def _point(line: dict[str, Any], name: str) -> list[float] | None:
    step, value = line.get("step"), line.get(name)
    if not isinstance(step, int) or not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return [step, value]
