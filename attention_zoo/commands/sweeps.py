"""A sweep through any of Hydra's launchers: what is finished is left out, what somebody else does is waited for last,
and what a worker took along when it died is launched again.

A launcher starts jobs and brings back what they returned; some break off at the first worker that dies. What a cell
came to therefore lies in its folder, and is read there.
"""

from __future__ import annotations

import secrets
import threading
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
from attention_zoo.commands.job import Control, Job, end_trainings
from attention_zoo.commands.launch import FAILED, ending
from attention_zoo.commands.work import COMMANDS, Outcome

Words = tuple[str, ...]
"""The overrides of one job."""
TRIES = 3
"""How often a cell is begun whose process somebody ends, and a launcher that brings nothing back."""
LOOK_S = 0.3


class Dry(Exception):
    """All that was asked for is said."""


class Sweep:
    """All jobs of one call.

    Args:
        job: what a launcher calls with the config of each.
        command: as it was typed, for the plan.
    """

    def __init__(self, job: Job, command: str):
        self.job, self.command = job, command
        self.outcomes: dict[Words, Outcome] = {}
        self.cells: dict[Words, Any] = {}
        self.names: dict[Words, str] = {}
        self.tries: Counter[Words] = Counter()

    def of(self, context: HydraContext, config: DictConfig, jobs: Sequence[Words]) -> None:
        """Get to know all jobs: where each goes, and which are finished."""
        self.names = dict(zip(jobs, told_apart(jobs)))
        make = COMMANDS[self.job.name].cell
        if make is None:
            return
        import torch

        folder = Path(str(config.hydra.sweep.dir)).absolute()
        control = Control(time.time(), torch.get_num_threads(), folder / f".stop.{secrets.token_hex(4)}")
        for words in jobs:
            with suppress(ValueError):  # the job itself says what is wrong with its config
                composed = context.config_loader.load_sweep_config(config, list(words))
                cell = self.cells[words] = make(composed, composed.hydra)
                control.places[key_of(composed.hydra)] = str(cell.folder)
        self.job.control = control
        self._settle(jobs)

    def launch(self, inner: Launcher, jobs: Sequence[Words], at_once: int) -> None:
        """Have every job done that is not.

        Args:
            at_once: jobs that the launcher is given at a time.
        """
        if self.job.control is None:
            self._rounds(inner, jobs, at_once, lambda: None)
            return
        with stopping.graceful() as asked, _Watch(self, jobs, asked):
            try:
                self._rounds(inner, jobs, at_once, asked)
            finally:
                end_trainings()

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
            self.sweep.of(self.context, self.config, jobs)
            self.sweep.launch(self.inner, jobs, len(batches[0]))
        return [_returned(words, self.sweep.outcomes[words]) for words in asked]


class _Watch:
    """Beside a launcher that works: tells its workers when to stop, and the user which cells have ended. A context."""

    def __init__(self, sweep: Sweep, jobs: Sequence[Words], asked: Callable[[], Any]):
        self.sweep, self.jobs, self.asked = sweep, jobs, asked
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch the sweep")

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        assert self.sweep.job.control is not None
        self.sweep.job.control.stop.unlink(missing_ok=True)

    def _run(self) -> None:
        control = self.sweep.job.control
        assert control is not None
        while not self.over.wait(LOOK_S):
            if self.asked():
                with suppress(OSError):  # the disk is full: those in this process's group have heard it themselves
                    control.stop.touch()


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
