"""Run a command whose config Hydra composes: one job, or with -m a sweep of them through any of Hydra's launchers."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from attention_zoo.commands.help import page
from attention_zoo.commands.launch import DEBUG, FAILED, OK, ending, say
from attention_zoo.commands.refusals import choices, flags, of_hydra, of_sweep
from attention_zoo.commands.work import COMMANDS, Outcome
from attention_zoo.searchpath import register
from attention_zoo.settings import one_line, said_of

CONF = "pkg://attention_zoo.conf"


def run(name: str, words: Sequence[str], program: str) -> int:
    """Compose the config of a command from its words and do the work, once or as a sweep.

    Args:
        name: of the command, and of its root config.
        words: of the command line, after the command.
        program: how the command was called, for its help.

    Returns:
        the exit code: the first of 1 and 2 that a job ended with, else 0.
    """
    words = flags(words)
    COMMANDS[name].register()
    register()
    if "--help" in words or "-h" in words:
        print(page(name, [word for word in words if not word.startswith("-")], program))
        return OK
    job = Job(name, os.environ.get(DEBUG) == "1")
    overrides = [word for word in words if not word.startswith("-")]
    choices(overrides)
    returned: list[Outcome] = []
    with _raising(), _recorded(returned), _replaced(sys, argv=[program, *words]):
        try:
            hydra.main(config_path=CONF, config_name=name, version_base="1.3")(job)()
        except Exception as error:
            line = of_hydra(error) or one_line(error)
            if line is None:
                raise
            raise ValueError(said_of(of_sweep(line, overrides), overrides)) from error
    outcomes = returned or job.outcomes
    for outcome in outcomes:
        # a job in another process or on another machine told it there, if anywhere
        if outcome.line and not (outcome.told and job.outcomes):
            say(f"error: {outcome.line}")
    wrong = [outcome.code for outcome in outcomes if outcome.code != OK]
    if wrong and len(outcomes) > 1:
        say(f"{len(wrong)} of {len(outcomes)} runs failed")
    return min(wrong, default=OK)


class Job:
    """What Hydra calls with the config of one job, in this process or another. It never raises an error of the job:
    the others of a sweep go on."""

    def __init__(self, name: str, debug: bool):
        self.name, self.debug = name, debug
        self.outcomes: list[Outcome] = []

    def __call__(self, composed: DictConfig) -> Outcome:
        try:
            _given(composed)
            outcome = COMMANDS[self.name].run(composed)
        except Exception as error:
            if self.debug:
                traceback.print_exception(error)
            outcome = Outcome(*ending(error))
        self.outcomes.append(outcome)
        return outcome


def _given(composed: DictConfig) -> None:
    """Refuse a config in which something is still to be given, naming all of it."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ValueError(f"{' and '.join(missing)} must be given, got ???")


@contextmanager
def _raising() -> Iterator[None]:
    """Hydra raises what it would otherwise print over many lines."""
    before = os.environ.get(DEBUG)
    os.environ[DEBUG] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEBUG]
        else:
            os.environ[DEBUG] = before


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _recorded(returned: list[Outcome]) -> Iterator[None]:
    """Keep what every job of a sweep returned: Hydra hands it to the sweeper alone, which drops it."""
    instantiate = Plugins.instantiate_launcher

    def recording(self: Plugins, *args: Any, **kwargs: Any) -> Launcher:
        return _Recording(instantiate(self, *args, **kwargs), returned)

    with _replaced(Plugins, instantiate_launcher=recording):
        yield


class _Recording(Launcher):
    """A launcher that keeps the outcome of each job, and tells the sweeper that all went well, so that it goes on."""

    def __init__(self, inner: Launcher, returned: list[Outcome]):
        self.inner, self.returned = inner, returned

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Was done by whoever made the inner one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        found = self.inner.launch(job_overrides, initial_job_idx)
        for job in found:
            if job.status != JobStatus.COMPLETED:
                failure = job._return_value
                job.return_value = Outcome(*ending(failure)) if isinstance(failure, Exception) else Outcome(FAILED)
                job.status = JobStatus.COMPLETED
            self.returned.append(job.return_value)
        return found
