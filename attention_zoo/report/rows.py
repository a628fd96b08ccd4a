"""Result rows as they come from results.jsonl: which count, which failed, which are stale, what each is called.

A row is a plain dict (kind "speed", "peer", "budget", "quality" or "portrait"); the report reads rows and nothing else,
so that a file of results from another machine is drawn like one's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attention_zoo.files import read_jsonl

Row = dict[str, Any]

STATUS = {
    "oom": "out of memory",
    "oom_predicted": "predicted out of memory, not run",
    "timeout": "timed out",
    "failed": "failed",
    "unsupported": "not supported",
    "missing": "not installed",
}
BASELINES = {("full", "dense"): "full (materialised)", ("full", "sdpa"): "full (fused)"}
"""What every mechanism is compared with, by (backend, kernel): the same sums, with and without L x S in memory."""


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of several JSONL files; of a result that occurs twice the last one counts.

    Raises:
        ValueError: for a file that does not exist, or a row without the common keys, naming file and line.
    """
    rows: list[Row] = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"results must name JSONL files, got {str(path)!r}, which does not exist")
        for number, row in enumerate(read_jsonl(path), 1):
            lacking = [key for key in ("kind", "backend", "status") if key not in row]
            if lacking:
                raise ValueError(f"{path}, row {number}: lacks {', '.join(lacking)}")
            rows.append(row)
    return unique(rows)


def unique(rows: Iterable[Row]) -> list[Row]:
    """One row per identity, the last one, in the order of first appearance. Rows without an id are kept."""
    found: dict[Any, Row] = {}
    for number, row in enumerate(rows):
        key = (row["kind"], row["id"]) if row.get("id") else number
        found[key] = row
    return list(found.values())


def of(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def ok(row: Row) -> bool:
    return row["status"] == "ok"


def why(row: Row) -> str:
    """One line on why a row holds no figure."""
    return f"{status(row)}: {row['error']}" if row.get("error") else status(row)


def status(row: Row) -> str:
    """The status in words."""
    return STATUS.get(row["status"], str(row["status"]))


def stale(rows: Iterable[Row], digest: str) -> list[Row]:
    """Rows that were made by other code than `digest` stands for."""
    return [row for row in rows if (row.get("environment") or {}).get("source") not in (None, digest)]


def options(row: Row) -> dict[str, Any]:
    """The mechanism's own options that a row was made with, as far as its config tells."""
    config = row.get("config") or {}
    found = config.get("options")
    if found is None and isinstance(config.get("attention"), dict):
        found = config["attention"]
    return {key: value for key, value in (found or {}).items() if key not in ("_target_", "_partial_", "name")}


def what(row: Row) -> str:
    """What a row is about, in words."""
    if row["kind"] == "speed":
        name = BASELINES.get((row["backend"], row.get("kernel") or ""), row["backend"])
        phase = str(row.get("phase") or "").replace("_", " + ")
        return f"{name}, {row.get('variant')} {phase}, {row.get('length'):,} tokens"
    if row["kind"] == "peer":
        return f"{row['backend']} against {row['title']}, {row['variant']}, {row['length']:,} tokens"
    if row["kind"] == "budget":
        return f"{row['backend']}, longest {row['variant']} within {row['budget_bytes']:,} bytes"
    if row["kind"] == "quality":
        return f"{row['backend']}, trained on {row.get('task')}, seed {row.get('seed')}"
    return f"{row['backend']}, attention picture"


def differing(many: list[dict[str, Any]]) -> list[str]:
    """For each of several option sets the options that set it apart, in words; empty when there is nothing to tell."""
    keys = sorted({key for each in many for key in each})
    shown = [key for key in keys if len({json.dumps(each.get(key), sort_keys=True) for each in many}) > 1]
    return [", ".join(f"{key}={each[key]}" for key in shown if key in each) for each in many]
