"""A sweep through any of Hydra's launchers: what is finished is left out, what somebody else does is waited for last,
and what a worker took along when it died is launched again.

A launcher starts jobs and brings back what they returned; some break off at the first worker that dies. What a cell
came to therefore lies in its folder, and is read there.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from attention_zoo import stopping
from attention_zoo.commands import launchers
from attention_zoo.commands.job import Control, Job, end_nursery, nursery
from attention_zoo.commands.launch import FAILED, ending
from attention_zoo.commands.work import COMMANDS, Outcome
from attention_zoo.measure.environment import usable_cores

Words = tuple[str, ...]
"""The overrides of one job."""
TRIES = 3
"""How often a cell is begun whose process somebody ends, and a launcher that brings nothing back."""


class Dry(Exception):
    """All that was asked for is said."""


class Sweep:
    """All jobs of one call.

    Args:
        job: what a launcher calls with the config of each.
    """

    def __init__(self, job: Job):
        self.job, self.folder = job, Path()
        self.outcomes: dict[Words, Outcome] = {}
        self.cells: dict[Words, Any] = {}
        self.names: dict[Words, str] = {}
        self.tries: Counter[Words] = Counter()
        self.composing_s = 0.0

    def of(self, context: HydraContext, config: DictConfig, jobs: Sequence[Words]) -> None:
        """Get to know all jobs: where each goes, and which are finished."""
        self.names = dict(zip(jobs, told_apart(jobs)))
        make = COMMANDS[self.job.name].cell
        if make is None:
            return
        import torch

        place = Path(str(config.hydra.sweep.dir)).absolute()
        self.folder = place / _digest(jobs)
        control = Control(time.time(), torch.get_num_threads(), place / f".stop.{secrets.token_hex(4)}")
        for words in jobs:
            with suppress(ValueError):  # the job itself says what is wrong with its config
                composed = context.config_loader.load_sweep_config(config, list(words))
                cell = self.cells[words] = make(composed, composed.hydra)
                control.places[key_of(composed.hydra)] = str(cell.folder)
        self.composing_s = (time.time() - control.since) / len(jobs)
        self.job.control = control
        self._settle(jobs)

    def announce(self, launcher: DictConfig, jobs: Sequence[Words], at_once: int, *, dry: bool) -> None:
        """Say what all will take, and leave a plan by which others can tell how far it is.

        Raises:
            Dry: if that was all.
        """
        if self.job.control is None:
            return
        from attention_zoo.jobs.needs import needs, start_seconds, summary
        from attention_zoo.jobs.plan import Planned, write_plan

        threads = self.job.control.threads
        parallel, here = at_a_time(launcher, at_once)
        open_ = [words for words in self.cells if words not in self.outcomes]
        left = [words for words in open_ if not self.cells[words].refused]
        cells = [self.cells[words] for words in left]
        kept, before = self.folder.parent, 0.0
        start = start_seconds(kept, nursery()) if here and cells else 0.0
        found = dict(zip(left, needs(cells, kept, nursery(), threads=threads, timing=here)))
        if here and cells:
            before = start * (starts(launcher) or dry or not nursery().started)
            # more at a time than there are cores for make each slower
            parallel = max(1, min(parallel, usable_cores() // max(cell.config["threads"] or threads for cell in cells)))
            rounds = math.ceil(len(cells) / parallel)
            if "submitit_folder" in launcher:  # each cell is a job of its own, and starts anew
                before *= rounds
            before += self.composing_s * rounds  # as was done here, whoever does the cell does again
        refused = len(open_) - len(left)
        how: dict[str, Any] = {"refused": refused, "before": before}
        line = summary(list(found.values()), len(jobs), len(self.outcomes), parallel, **how)
        print(f"{line}; {self.folder.parent.parent}", flush=True)
        if dry:
            raise Dry
        planned = []
        for words, cell in self.cells.items():
            need, config = found.get(words), cell.config
            planned.append(Planned(
                self.names[words], "training", str(cell.folder), steps=config["steps"],
                tokens=config["batch"] * config["seq_len"], seconds=need.seconds if need else None,
            ))  # fmt: skip
        write_plan(self.folder, self.job.command, planned, parallel=parallel)

    def launch(self, inner: Launcher, jobs: Sequence[Words], at_once: int) -> None:
        """Have every job done that is not.

        Args:
            at_once: jobs that the launcher is given at a time.
        """
        if self.job.control is None:
            self._rounds(inner, jobs, at_once, lambda: None)
            return
        from attention_zoo.commands.watch import Watch

        left = {self.names[words]: cell for words, cell in self.cells.items() if words not in self.outcomes}
        watch = Watch(left, len(jobs), self.folder, self.job.control.stop, lambda: asked())
        with stopping.graceful() as asked, watch, stopping.ctrl_c_here_alone():
            launchers.start(inner)
            self._rounds(inner, jobs, at_once, asked)

    def _rounds(self, inner: Launcher, jobs: Sequence[Words], at_once: int, asked: Callable[[], Any]) -> None:
        fruitless = 0
        while (waiting := [words for words in jobs if words not in self.outcomes]) and not asked():
            failure = None
            for first in range(0, len(waiting), at_once):
                failure = self._round(inner, waiting[first : first + at_once], first) or failure
                if asked():
                    return
            self._settle(waiting)
            fruitless = 0 if any(words in self.outcomes for words in waiting) else fruitless + 1
            if failure is not None and (fruitless >= TRIES or not any(self.tries[words] for words in waiting)):
                raise failure
            self.job.patient = True

    def _round(self, inner: Launcher, jobs: Sequence[Words], first: int) -> Exception | None:
        """Launch some jobs once; what the launcher itself raised."""
        try:
            found = inner.launch([list(words) for words in jobs], first)
        except Exception as error:
            for words in jobs:
                cell = self.cells.get(words)
                self.tries[words] += cell is not None and cell.folder.exists()
            return error
        for words, returned in zip(jobs, found):
            self._take(words, _outcome(returned))
        return None

    def _take(self, words: Words, outcome: Outcome) -> None:
        """Keep an outcome that will stay as it is."""
        self.tries[words] += outcome.state == "lost"
        if outcome.state == "ended" or (outcome.state == "lost" and self.tries[words] >= TRIES):
            self.outcomes[words] = outcome

    def _settle(self, jobs: Sequence[Words]) -> None:
        """Read what there is of cells whose outcome nobody brought."""
        for words in jobs:
            control, cell = self.job.control, self.cells.get(words)
            if words not in self.outcomes and cell is not None and control is not None:
                row = cell.result(control.since)
                if row is not None:
                    self.outcomes[words] = Outcome.of(row, cell.folder)


class Sweeping(Launcher):
    """A launcher that does what `Sweep` says through another one, and hands the sweeper what all jobs came to.

    Args:
        inner: set up.
        sweep: of all jobs of this call.
        batches: gives all jobs of the sweep, in the sweeper's batches, where the sweeper knows them.
    """

    def __init__(
        self, inner: Launcher, sweep: Sweep, context: HydraContext, config: DictConfig,
        batches: Callable[[], Sequence[Sequence[Sequence[str]]] | None],
    ):  # fmt: skip
        self.inner, self.sweep, self.context, self.config, self.batches = inner, sweep, context, config, batches

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Was done by whoever made the inner one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        asked = [tuple(words) for words in job_overrides]
        if any(words not in self.sweep.outcomes for words in asked):
            batches = self.batches() or [job_overrides]
            jobs = [tuple(words) for batch in batches for words in batch]
            try:
                self.sweep.of(self.context, self.config, jobs)
                dry = bool(self.config.get("dry"))
                self.sweep.announce(self.config.hydra.launcher, jobs, len(batches[0]), dry=dry)
                self.sweep.launch(self.inner, jobs, len(batches[0]))
            finally:
                end_nursery()
        return [_returned(words, self.sweep.outcomes[words]) for words in asked]


def at_a_time(launcher: DictConfig, at_once: int) -> tuple[int, bool]:
    """How many jobs a launcher runs at a time, and whether on this machine.

    Args:
        launcher: its config.
        at_once: jobs that it is given at a time.
    """
    if "array_parallelism" in launcher:  # Slurm
        return min(at_once, launcher.array_parallelism), False
    if "n_jobs" in launcher:  # joblib
        return min(at_once, launcher.n_jobs if launcher.n_jobs > 0 else usable_cores()), True
    if "ray" in launcher:
        return min(at_once, usable_cores()), launcher.ray.init.get("address") is None
    return (at_once if "submitit_folder" in launcher else 1), True


def starts(launcher: DictConfig) -> int:
    """How many processes start one after the other before a job of a launcher begins: one that Hydra's job runs in, and
    one that forks its trainings, which in this process is there already.

    Args:
        launcher: its config.
    """
    return 2 if {"n_jobs", "ray", "submitit_folder"} & set(launcher) else 0


def _digest(jobs: Sequence[Words]) -> str:
    """The same for all calls that are about the same jobs, whoever does them and how."""
    said = ("retry=", "force=", "dry=", "hydra")
    kept = sorted(" ".join(sorted(word for word in words if not word.lstrip("+").startswith(said))) for words in jobs)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def told_apart(jobs: Sequence[Words]) -> list[str]:
    """What tells each job from the others: those of its words that not all have."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in words if word not in common and not word.startswith("hydra")) for words in jobs]


def key_of(hydra: Any) -> str:
    """By which a job finds what was planned for it, wherever it runs."""
    return " ".join(hydra.overrides.task)


def _outcome(returned: JobReturn) -> Outcome:
    """What a job came to: it never raises, so that what was raised is the launcher's, or of its config."""
    if returned.status == JobStatus.COMPLETED:
        return returned.return_value
    failure = returned._return_value
    return Outcome(*ending(failure)) if isinstance(failure, Exception) else Outcome(FAILED)


def _returned(words: Words, outcome: Outcome) -> JobReturn:
    found = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
    found.return_value = outcome
    return found
