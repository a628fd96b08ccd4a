"""Run several trainings, each in a fresh process, a few at a time; keep every row; never train twice what is trained.

A run that fails, is killed or takes far too long is a row like any other, and the rest go on; one that was ended from
outside goes on from its checkpoint at the next call. The fresh process (`train`) leaves `<folder>/result.json`, and
ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from attention_zoo import stopping
from attention_zoo.files import Damaged, plain, read_jsonl, safe_name
from attention_zoo.jobs.following import send_end
from attention_zoo.jobs.slots import NeverBegun, Process, Slots
from attention_zoo.measure.ends import Ended, how_it_ended, oom_kills
from attention_zoo.measure.kept import keep_row, make_way, number
from attention_zoo.measure.servers import Gone
from attention_zoo.registry import read_shipped
from attention_zoo.results.row import Row
from attention_zoo.training import timing
from attention_zoo.training.building import build
from attention_zoo.training.config import options_of
from attention_zoo.training.records import RESULT, kept_row, lost_row, read_row
from attention_zoo.training.run import run_identity, run_training
from attention_zoo.words import say

FIRST = (*timing.FIRST, "scipy.stats")
"""What a process is forked with: also what the bootstrap over evaluation rows imports."""
POLL_S = 0.25
GRACE_S = 120.0
"""What a run may take beyond thrice its own time budget before it is ended: start, data, evaluation, other load."""
LEAVE_S = 20.0
"""What a run that is asked to stop may take to save where it is."""
LOG = "log.txt"
TAIL = 2**16
"""Bytes of a log that are read: its end."""


@dataclass(frozen=True)
class Run:
    """One training.

    Fields:
        name: unique.
        config: composed conf/train.yaml as plain values.
    """

    name: str
    config: dict[str, Any]

    def within(self, folder: str | Path) -> Path:
        """Its own folder in that of all."""
        return Path(folder) / safe_name(self.name)


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
    process: Process | NeverBegun
    kills: int
    silent: bool = False
    started: float = field(default_factory=time.monotonic)


def run_trainings(
    runs: Sequence[Run],
    folder: str | Path,
    *,
    parallel: int = 2,
    retry: str | None = None,
    on_event: Callable[[RunEvent], None] = lambda event: None,
    on_bad: Callable[[str], None] = say,
) -> list[Row]:
    """Train everything that is not trained yet.

    Args:
        runs: what to train; each goes to its own folder in `folder`.
        parallel: runs at a time; each keeps to its config's `threads`.
        retry: "failed" trains again what failed, ran out of memory or timed out; None: these are results.
        on_event: called at every step, and a few times a second between them.
        on_bad: told in one line about each earlier result that cannot be read; it is trained again.

    Returns:
        the rows in the order of `runs`.

    Raises:
        KeyboardInterrupt: when asked to stop; the runs then have saved where they were.
        OSError: if a folder or a row cannot be written, naming it.
    """
    rows: dict[str, Row] = {}
    waiting: list[Run] = []
    running: list[_Child] = []
    silent: list[_Child] = []
    began = time.monotonic()
    _data.cache_clear()  # a file may have changed since an earlier call

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
        old = finished(run.config, run.within(folder), retry=retry, on_bad=on_bad)
        if old is None:
            waiting.append(run)
        else:
            rows[run.name] = old
            skipped.add(run.name)
            tell("skipped", run, old)
    with Slots() as slots:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    running.append(_start(waiting.pop(0), Path(folder), slots))
                    tell("started", running[-1].run)
                time.sleep(POLL_S)
                for child in list(running):
                    row = _result(child)
                    if row is not None:
                        running.remove(child)
                        rows[child.run.name] = row
                        silent += [child] * child.silent
                        tell("finished", child.run, row)
                tell("waiting")
        except BaseException:
            _stop(running)
            raise
    for child in silent:  # when nothing runs any more that would have to wait
        send_end(rows[child.run.name], child.folder, say=on_bad)
    return [rows[run.name] for run in runs]


def _stop(running: Sequence[_Child]) -> None:
    """End runs in such a way that they go on where they were; a second signal ends them at once."""
    try:
        for child in running:
            child.process.terminate()
        until = time.monotonic() + LEAVE_S
        for child in running:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, until - time.monotonic()))
    finally:
        for child in running:
            child.process.kill()
            child.process.wait()


def finished(
    config: dict[str, Any],
    folder: Path,
    *,
    retry: str | None = None,
    on_bad: Callable[[str], None] = lambda line: None,
) -> Row | None:
    """The row of an earlier run of the same config, code, machine and data; None where there is none to trust."""
    try:
        read_row(folder / RESULT)
    except FileNotFoundError:
        return None
    except Damaged as error:
        on_bad(f"{error}; trained again")
        return None
    identity = identity_of(config)
    if config.get("force") or identity is None:
        return None
    return kept_row(folder, identity, data_of(config), retry=retry or config.get("retry"), notice=on_bad)


def identity_of(config: Mapping[str, Any]) -> str | None:
    """The name of a run's result; None where its config has none."""
    try:
        return run_identity(config)
    except (ValueError, TypeError):  # a device that is not there, a value that is none: the run says so
        return None


def data_of(config: Mapping[str, Any]) -> Any:
    """What its task says of its data; None where the task cannot be built."""
    try:
        return _data(json.dumps(config["task"]), config["seq_len"])
    except Exception:  # data that are not there, or a task that cannot be built: the run says so, in its row
        return None


@cache
def _data(task: str, seq_len: int) -> Any:
    return json.loads(json.dumps(plain(build(json.loads(task)).describe(seq_len))))


def _start(run: Run, folder: Path, slots: Slots) -> _Child:
    place = run.within(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, LOG):
        make_way(place / name)
    (place / RESULT).unlink(missing_ok=True)
    given = {"config": run.config, "folder": str(place), "threads": run.config.get("threads") or 1}
    kills = oom_kills()
    process: Process | NeverBegun
    with open(place / LOG, "wb") as log:
        try:
            process = slots.start("attention_zoo.jobs.trainings:train", given, log.fileno())
        except Gone as gone:
            log.write(gone.ended.reason.encode())
            process = NeverBegun()
    return _Child(run, place, process, kills)


def _result(child: _Child) -> Row | None:
    """The row of a run that is over; None while it is not."""
    code = child.process.poll()
    if code is None:
        budget = options_of(child.run.config).trainer.max_seconds
        limit = None if budget is None else 3 * budget + GRACE_S
        if limit is None or time.monotonic() - child.started < limit:
            return None
        child.process.kill()
        child.process.wait()
        return _unfinished(child, Ended("timeout", f"not through within {limit:g} s"))
    try:
        row = read_row(child.folder / RESULT)
    except FileNotFoundError:
        return _unfinished(child, _how_it_ended(child, code))
    except Damaged as error:
        return _unfinished(child, Ended("failed", str(error)))
    return {**row, "task": row.get("task") or task_name(child.run.config)}


def _how_it_ended(child: _Child, code: int) -> Ended:
    if code in (stopping.REQUEUE, stopping.CTRL_C):
        return Ended("lost", "asked to stop from outside; the next call goes on from its checkpoint")
    with open(child.folder / LOG, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        said = log.read().decode(errors="replace")
    return how_it_ended(code, said, killed_for_memory=oom_kills() > child.kills)


def _unfinished(child: _Child, ended: Ended) -> Row:
    """The row of a run that has left none. One that was asked to stop has told its tracker itself."""
    config = child.run.config
    child.silent = child.process.returncode not in (stopping.REQUEUE, stopping.CTRL_C)
    row = lost_row(config, identity_of(config), ended, task=task_name(config), data=data_of(config))
    keep_row(child.folder / RESULT, row)
    return row


def task_name(config: Mapping[str, Any]) -> str:
    """Of a run whose task said none."""
    return str(config["task"]["_target_"]).rpartition(".")[2].lower()


def _share(child: _Child) -> float:
    """How far a run is, from its metrics."""
    try:
        steps = [row["step"] for row in read_jsonl(child.folder / "metrics.jsonl") if number(row.get("step"))]
    except (FileNotFoundError, Damaged):  # not begun; or the run finds that it cannot write there, and says so
        return 0.0
    return min(max(steps, default=0) / child.run.config["steps"], 1.0)


def prepare() -> None:
    """What every training asks, to name its run and to check its options: once, for all that are forked."""
    read_shipped()


_shared: set[str] = set()


def share(given: Mapping[str, Any]) -> None:
    """What a training's task makes for all runs of it (`Task.share`), once for the same options.

    Other people's tasks are not built here: what they start would not survive a fork.
    """
    node = given["config"]["task"]
    name = json.dumps(node, sort_keys=True)
    if name not in _shared and str(node["_target_"]).startswith("attention_zoo."):
        _shared.add(name)
        build(node, "task").share()


def train(config: dict[str, Any], folder: str, threads: int) -> dict[str, Any]:
    """What the process does; asked to stop, it ends with a code of its own."""
    try:
        stopping.install()
        torch.set_num_threads(threads)
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))  # of what it starts itself
        row = run_training(config, folder)
    except KeyboardInterrupt as stop:
        sys.stdout.flush()
        os._exit(stop.code if isinstance(stop, stopping.Stopped) else stopping.CTRL_C)
    print(f"{row['status']}: {row['error']}")  # to the log: the row itself may not have been writable
    return {}
