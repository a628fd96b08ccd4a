"""Figures as JSON lines in the run's own folder: the source of truth, readable at any moment, whole after a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attention_zoo.files import append_jsonl, read_jsonl, write_atomic
from attention_zoo.tracking.tracker import RunInfo, Tracker


class JsonlTracker(Tracker):
    """Writes `<folder>/metrics.jsonl`: one line per log, `{"step": n, "group/metric": value, ...}`.

    Every line is on its way to the disk before `log` returns. NaN and infinity, which are no JSON, become null.
    """

    def __init__(self, info: RunInfo):
        self.path = Path(info.folder) / "metrics.jsonl"

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}
        append_jsonl(self.path, {"step": step, **finite})

    def result(self, row: Mapping[str, Any]) -> None:
        pass  # the row has a file of its own

    def finish(self, *, failed: bool) -> None:
        pass

    @staticmethod
    def rewind(folder: Path, step: int) -> None:
        """Forget the lines after `step`, which a run that goes on from a checkpoint writes again."""
        path = Path(folder) / "metrics.jsonl"
        if path.exists():
            kept = [json.dumps(row) + "\n" for row in read_jsonl(path) if row["step"] <= step]
            write_atomic(path, "".join(kept))
