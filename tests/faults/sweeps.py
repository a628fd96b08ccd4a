"""Sweeps whose processes are killed or asked to stop at any moment, one of them or all, and that two parents share.

The next call makes everything whole: the same rows and figures as of a sweep that nobody disturbed, nothing done again
that was done, nothing left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attention_zoo.commands.main import main
from attention_zoo.files import Damaged, read_json

from . import Counts
from .cells import ROOT
from .kills import left_by
from .signals import Disturbed

TITLE = "sweeps in this process, joblib and submitit, with one parent or two: processes killed or asked to stop"
SMALL, LARGE = 1, 80
LAUNCHERS = {"basic": (), "joblib": (), "submitit_local": ("hydra.sweeper.max_batch_size=2",)}
CELLS = 3
WORDS = (
    "task=mqar", "device=cpu", "threads=1", "steps=60", "batch=4", "seq_len=16", "model.dim=16", "tracker=none",
    "task.test_examples=8", "task.pairs=2", "trainer.progress=none", "trainer.checkpoint_every=10",
    "trainer.log_every=5", "trainer.eval_every=20", f"seed={','.join(map(str, range(CELLS)))}",
)  # fmt: skip

Found = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Disturb sweeps by at least `count` signals."""
    found = Counts()
    with tempfile.TemporaryDirectory() as place:
        expected = undisturbed(Path(place) / "whole")
        number = 0
        while found.tries < count:
            case, number = f"sweeps {seed}:{number}", number + 1
            for way, problem in _throw(random.Random(case), Path(place) / str(number), expected, found):
                found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random, folder: Path, expected: dict[str, Any], counts: Counts) -> Found:
    launcher = rng.choice(list(LAUNCHERS))
    hit = Disturbed(
        rng, lambda: _start(folder, launcher), lambda: bool(list(folder.glob("*/.claim"))), lambda: finished(folder),
        counts,
    )  # fmt: skip
    for way, problem in hit.run():
        yield way, f"{launcher}, {problem}"
    case, done = f"{launcher}, {hit.case}", hit.done
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
