"""Run several trainings, each in a fresh process, a few at a time; keep every row; never train twice what is trained.

A run that fails, is killed or takes far too long is a row like any other, and the rest go on. `python -m` of this
module is the fresh process: it reads one run from standard input and leaves `<folder>/result.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from attention_zoo.files import read_jsonl, write_json
from attention_zoo.measure.environment import environment
from attention_zoo.report.rows import Row
from attention_zoo.training.records import RESULT, kept_row
from attention_zoo.training.run import build, run_identity, run_training

POLL_S = 0.25
GRACE_S = 120.0
"""What a run may take beyond thrice its own time budget before it is ended: start, data, evaluation, other load."""


@dataclass(frozen=True)
class Run:
    """One training.

    Fields:
        name: unique, fit for a folder.
        config: composed conf/train.yaml as plain values.
    """

    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class RunEvent:
    """What `run_trainings` tells: a run is "skipped" (finished before), "started" or "finished" (row is there), or
    nothing happened but time ("waiting"). `done` and `share` (of all steps, 0 to 1) tell how far all runs are."""

    kind: Literal["skipped", "started", "finished", "waiting"]
    run: Run | None
    row: Row | None
    done: int
    total: int
    share: float
    remaining_s: float | None


@dataclass
class _Child:
    run: Run
    folder: Path
    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)


def run_trainings(
    runs: Sequence[Run],
    folder: str | Path,
    *,
    parallel: int = 2,
    on_event: Callable[[RunEvent], None] = lambda event: None,
) -> list[Row]:
    """Train everything that is not trained yet.

    Args:
        runs: what to train; each goes to `<folder>/<name>`.
        parallel: runs at a time; each keeps to its config's `threads`.
        on_event: called at every step, and a few times a second between them.

    Returns:
        the rows in the order of `runs`.
    """
    rows: dict[str, Row] = {}
    waiting: list[Run] = []
    running: list[_Child] = []
    began = time.monotonic()

    def tell(kind: Any, run: Run | None = None, row: Row | None = None) -> None:
        fresh = [run for run in runs if run.name not in skipped]
        steps = {run.name: 1.0 if run.name in rows else 0.0 for run in fresh}
        steps |= {child.run.name: _share(child) for child in running}
        share = sum(steps.values()) / len(fresh) if fresh else 1.0
        passed = time.monotonic() - began
        left = passed * (1 - share) / share if share > 0.02 else None
        on_event(RunEvent(kind, run, row, len(rows), len(runs), share, left))

    skipped: set[str] = set()
    for run in runs:
        old = finished(run.config, Path(folder) / run.name)
        if old is None:
            waiting.append(run)
        else:
            rows[run.name] = old
            skipped.add(run.name)
            tell("skipped", run, old)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                running.append(_start(waiting.pop(0), Path(folder)))
                tell("started", running[-1].run)
            time.sleep(POLL_S)
            for child in list(running):
                row = _result(child)
                if row is not None:
                    running.remove(child)
                    rows[child.run.name] = row
                    tell("finished", child.run, row)
            tell("waiting")
    finally:
        for child in running:
            child.process.kill()
    return [rows[run.name] for run in runs]


def finished(config: dict[str, Any], folder: Path) -> Row | None:
    """The row of an earlier run of the same config, code, machine and data; None where there is none to trust."""
    if config.get("force") or not (folder / RESULT).is_file():
        return None
    data = _data(json.dumps(config["task"]), config["seq_len"])
    return kept_row(folder, run_identity(config), data, retry=config.get("retry"))


@cache
def _data(task: str, seq_len: int) -> Any:
    return build(json.loads(task)).describe(seq_len)


def _start(run: Run, folder: Path) -> _Child:
    place = folder / run.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").unlink(missing_ok=True)
    threads = str(run.config.get("threads") or 1)
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": paths}
    with open(place / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "attention_zoo.report.trainings"],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps({"config": run.config, "folder": str(place)}))
    process.stdin.close()
    return _Child(run, place, process)


def _result(child: _Child) -> Row | None:
    """The row of a run that is over; None while it is not."""
    code = child.process.poll()
    if code is None:
        budget = child.run.config["trainer"]["max_seconds"]
        limit = None if budget is None else 3 * budget + GRACE_S
        if limit is None or time.monotonic() - child.started < limit:
            return None
        child.process.kill()
        child.process.wait()
        return _lost(child, "timeout", f"not through within {limit:g} s")
    path = child.folder / "result.json"
    if path.is_file():
        row = json.loads(path.read_text())
        return row | {"task": row["task"] or _task_name(child.run)}
    if code == -9:
        return _lost(child, "oom", "killed from outside (signal 9), which is how Linux ends a process out of memory")
    lines = (child.folder / "log.txt").read_text().strip().splitlines()
    return _lost(child, "failed", f"exit code {code}: {lines[-1][:300] if lines else 'no message'}")


def _lost(child: _Child, status: str, error: str) -> Row:
    config = child.run.config
    row = {
        "kind": "quality", "id": run_identity(config), "backend": config["backend"], "status": status, "error": error,
        "environment": environment(), "config": config, "task": _task_name(child.run),
        **{name: config[name] for name in ("seed", "seq_len", "batch")},
    }  # fmt: skip
    write_json(child.folder / "result.json", row)
    return row


def _task_name(run: Run) -> str:
    return str(run.config["task"]["_target_"]).rpartition(".")[2].lower()


def _share(child: _Child) -> float:
    """How far a run is, from the last line of its metrics."""
    path = child.folder / "metrics.jsonl"
    step = max((row["step"] for row in read_jsonl(path)), default=0) if path.is_file() else 0
    return min(step / child.run.config["steps"], 1.0)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    run_training(asked["config"], asked["folder"])
