"""Figures as JSON lines in the run's own folder: the source of truth, readable at any moment, whole after a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attention_zoo.files import append_jsonl, read_jsonl, write_atomic
from attention_zoo.tracking.tracker import RunInfo, Tracker

NAME = "metrics.jsonl"


class JsonlTracker(Tracker):
    """Writes `<folder>/metrics.jsonl`: one line per log, `{"step": n, "group/metric": value, ...}`.

    Every line is on its way to the disk before `log` returns. NaN and infinity, which are no JSON, become null.

    Attributes:
        lines: how many there are, from the run's beginning.
    """

    def __init__(self, info: RunInfo):
        self.path = Path(info.folder) / NAME
        self.lines = self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}
        append_jsonl(self.path, {"step": step, **finite})
        self.lines += 1

    def result(self, row: Mapping[str, Any]) -> None:
        pass  # the row has a file of its own

    def finish(self, *, failed: bool) -> None:
        pass

    @staticmethod
    def rewind(
        folder: Path, step: int, lines: int | None = None, on_bad: Callable[[str], None] = lambda line: None
    ) -> None:
        """Forget what a run that goes on from a checkpoint writes again.

        Args:
            folder: of the run.
            step: of the checkpoint; lines of later steps go.
            lines: how many there were at the checkpoint; None: all of its step stay.
            on_bad: told about each line that is none of ours, in one sentence; it goes too.

        Raises:
            Damaged: for something that is no file, naming it.
        """
        path = Path(folder) / NAME
        if not path.exists():
            return
        unreadable: list[str] = []
        kept: list[dict[str, Any]] = []
        for number, row in enumerate(read_jsonl(path, on_bad=unreadable.append)):
            place = row.get("step")
            if not isinstance(place, int):
                on_bad(f"{path} holds a line without a step, {json.dumps(row)[:60]}; left out")
            elif place <= step and (lines is None or number + len(unreadable) < lines):
                kept.append(row)
        for line in unreadable:
            on_bad(line)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
