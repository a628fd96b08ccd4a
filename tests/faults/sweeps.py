"""Sweeps whose processes are killed or asked to stop at any moment, one of them or all, and that two parents share.

The next call makes everything whole: the same rows and figures as of a sweep that nobody disturbed, nothing done again
that was done, nothing left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attention_zoo.commands.main import main
from attention_zoo.files import Damaged, read_json

from . import Counts
from .cells import ROOT, _left, _marked, _orphans, _send
from .kills import left_by

TITLE = "sweeps in this process, joblib and submitit, with one parent or two: processes killed or asked to stop"
SMALL, LARGE = 1, 40
ENDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
LAUNCHERS = {"basic": (), "joblib": (), "submitit_local": ("hydra.sweeper.max_batch_size=2",)}
PATIENCE_S = 240.0
CELLS = 3
WORDS = (
    "task=mqar", "device=cpu", "threads=1", "steps=60", "batch=4", "seq_len=16", "model.dim=16", "tracker=none",
    "task.test_examples=8", "task.pairs=2", "trainer.progress=none", "trainer.checkpoint_every=10",
    "trainer.log_every=5", "trainer.eval_every=20", f"seed={','.join(map(str, range(CELLS)))}",
)  # fmt: skip

Found = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Disturb `count` sweeps."""
    found = Counts()
    with tempfile.TemporaryDirectory() as place:
        expected = undisturbed(Path(place) / "whole")
        for number in range(count):
            case = f"sweeps {seed}:{number}"
            found.tries += 1
            for way, problem in _throw(random.Random(case), Path(place) / str(number), expected):
                found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random, folder: Path, expected: dict[str, Any]) -> Found:
    launcher, parents, by = rng.choice(list(LAUNCHERS)), rng.choice((1, 2)), rng.choice(ENDS)
    case = f"{parents} parents, {launcher}, {by.name}"
    with _marked() as mark:
        jobs = [_start(folder, launcher) for _ in range(parents)]
        until = time.monotonic() + PATIENCE_S
        while not list(folder.glob("*/.claim")) and time.monotonic() < until and jobs[0].poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 6))
        whom = [jobs[0].pid]
        if rng.random() < 0.5:  # a terminal's Ctrl-C comes to all, and so does what a scheduler says
            whom = [rng.choice([*_left(mark), jobs[0].pid])] if by == signal.SIGKILL else _left(mark)
        case += f" to {'a parent' if whom == [jobs[0].pid] else f'{len(whom)} processes'}"
        before = finished(folder)
        for each in whom:
            _send(each, by)
        for job in jobs:
            try:
                said = job.communicate(timeout=PATIENCE_S)[0]
            except subprocess.TimeoutExpired:
                yield "hung", f"{case}: a parent does not end"
                continue
            if "Traceback" in said:
                yield "raw", f"{case}: {said[-500:]}"
            # who was not ended itself goes on without the dead; its last cells may have been the dead's to the end
            wanted = (CODES[by], -by, 0) if job.pid in whom else (0,)
            if job.returncode not in wanted:
                yield "lost", f"{case}: a parent ended with {job.returncode}: {said[-500:]}"
        yield from _orphans(mark, case)
    done = {**before, **finished(folder)}
    code, told = _here(folder)
    if code != 0:
        yield "lost", f"{case}: the next call ended with {code}: {told[-500:]}"
        return
    if again := [name for name, when in done.items() if finished(folder).get(name) != when]:
        yield "wrong", f"{case}: done again: {again}"
    for name, result in results(folder).items():
        if result != expected[name]:
            yield "wrong", f"{case}: {name} differs"


def _start(folder: Path, launcher: str) -> subprocess.Popen[str]:
    words = [*WORDS, f"output={folder}", f"hydra/launcher={launcher}", *LAUNCHERS[launcher], "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", "attention_zoo", "train", *words], text=True, errors="replace", cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip


def _here(folder: Path) -> tuple[int, str]:
    """The same sweep by a call in this process; its exit code and what it said."""
    said, threads = io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main(["train", *WORDS, f"output={folder}", "-m"]), said.getvalue()
    finally:
        torch.set_num_threads(threads)


def finished(folder: Path, cells: str = "*") -> dict[str, int]:
    """When each cell was finished that is."""
    found = {}
    for path in folder.glob(f"{cells}/result.json"):
        with contextlib.suppress(Damaged, FileNotFoundError):
            if read_json(path)["status"] == "ok":
                found[path.parent.name] = path.stat().st_mtime_ns
    return found


def undisturbed(folder: Path) -> dict[str, Any]:
    """What a sweep leaves that nobody disturbs."""
    code, told = _here(folder)
    assert code == 0, told
    return results(folder)


def results(folder: Path) -> dict[str, Any]:
    """What all cells have left, but for times."""
    return {path.parent.name: left_by(path.parent) for path in sorted(folder.glob("*/result.json"))}
