"""Searches whose processes are killed or asked to stop at any moment, and that two parents share.

The next call makes everything whole: as many trials as were wanted, each with the figures of a training that nobody
disturbed, nothing done again that was done, nothing left behind, and a database that holds nothing half.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import torch
from optuna.exceptions import ExperimentalWarning

from attention_zoo.commands.main import main
from attention_zoo.jobs.study import original
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

from . import Counts
from .cells import ROOT
from .kills import left_by
from .signals import Disturbed
from .sweeps import finished

TITLE = "searches (Optuna), with one parent or two: processes killed or asked to stop"
SMALL, LARGE = 1, 40
TRIALS = 3
TRAINING = (
    "task=mqar", "device=cpu", "threads=1", "steps=60", "batch=4", "seq_len=16", "model.dim=16", "tracker=none",
    "task.test_examples=8", "task.pairs=2", "trainer.progress=none", "trainer.checkpoint_every=10",
    "trainer.log_every=5", "trainer.eval_every=20",
)  # fmt: skip
WORDS = (
    *TRAINING, "space.optimizer.lr=[1e-4,1e-2,log]", "space.model.depth=[1,2,int]", "pruner=none", "sampler=random",
    f"trials={TRIALS}", "heartbeat=1",
)  # fmt: skip

Found = Iterator[tuple[str, str]]


def run(count: int, seed: int) -> Counts:
    """Disturb searches by at least `count` signals."""
    found = Counts()
    with tempfile.TemporaryDirectory() as place:
        number = 0
        while found.tries < count:
            case, number = f"searches {seed}:{number}", number + 1
            for way, problem in _throw(random.Random(case), Path(place) / str(number), found):
                found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random, folder: Path, counts: Counts) -> Found:
    workers = rng.choice((1, 2))
    hit = Disturbed(
        rng, lambda: _start(folder, workers), lambda: bool(list(folder.glob("*/study.db"))),
        lambda: finished(folder, "*/*"), counts,
    )  # fmt: skip
    for way, problem in hit.run():
        yield way, f"{workers} workers, {problem}"
    case, done = f"{workers} workers, {hit.case}", hit.done
    code, told = _here(folder)
    if code != 0:
        yield "lost", f"{case}: the next call ended with {code}: {told[-500:]}"
        return
    after = finished(folder, "*/*")
    if again := [name for name, when in done.items() if after.get(name) != when]:
        yield "wrong", f"{case}: done again: {again}"
    yield from _whole(folder, case)


def _whole(folder: Path, case: str) -> Found:
    """As many trials as wanted, each as the training that its words describe."""
    (database,) = folder.glob("*/study.db")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    (name,) = optuna.get_all_study_names(f"sqlite:///{database}")
    trials = optuna.load_study(storage=f"sqlite:///{database}", study_name=name).trials
    states = [trial.state.name for trial in trials]
    ended = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(ended) != TRIALS or set(states) - {"COMPLETE", "FAIL"}:
        yield "lost", f"{case}: trials are {states}"
    for trial in ended:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            place = database.parent / f"trial-{original(trial):04d}"
        config = compose_training([*TRAINING, *trial.user_attrs["words"], f"output={folder}"])
        alone = folder / "alone" / place.name
        row = run_training(config, alone)
        if row["status"] != "ok" or trial.value != row["quality_curve"][-1][1]:
            yield "wrong", f"{case}: trial {trial.number} has {trial.value}, alone {row['quality_curve']}"
        if left_by(place) != left_by(alone):
            yield "wrong", f"{case}: trial {trial.number} left something else than it does alone"


def _start(folder: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "attention_zoo", "search", *WORDS, f"workers={workers}", f"output={folder}"],
        text=True, errors="replace", cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip


def _here(folder: Path) -> tuple[int, str]:
    """The same search by a call in this process; its exit code and what it said."""
    said, threads = io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main(["search", *WORDS, f"output={folder}"]), said.getvalue()
    finally:
        torch.set_num_threads(threads)
