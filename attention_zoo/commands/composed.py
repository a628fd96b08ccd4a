"""Run a command whose config Hydra composes: one job, or with -m a sweep of them through any of Hydra's launchers."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from attention_zoo.commands.help import page
from attention_zoo.commands.job import Job
from attention_zoo.commands.launch import DEBUG, OK, say
from attention_zoo.commands.refusals import choices, flags, of_hydra, of_sweep
from attention_zoo.commands.sweeps import Dry, Sweep, Sweeping
from attention_zoo.commands.work import COMMANDS
from attention_zoo.parallel.launched import launched
from attention_zoo.searchpath import register
from attention_zoo.settings import one_line, said_of

SYSTEM = (OSError, PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
"""Errors that come from the system as they are; Hydra has heirs of some for what it cannot find itself."""
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
    command, words = f"{program} {shlex.join(words)}", [COMMANDS[name].named(word) for word in flags(words)]
    COMMANDS[name].register()
    register()
    if "--help" in words or "-h" in words:
        print(page(name, [word for word in words if not word.startswith("-")], program))
        return OK
    _alone(name, words)
    job = Job(name, os.environ.get(DEBUG) == "1", command)
    sweep = Sweep(job)
    overrides = [word for word in words if not word.startswith("-")]
    choices(overrides)
    with _raising(), _swept(sweep), _replaced(sys, argv=[program, *words]):
        try:
            hydra.main(config_path=CONF, config_name=name, version_base="1.3")(job)()
        except Dry:
            return OK
        except Exception as error:
            # what the system says, such as of a disk that Hydra cannot write, is about no word of the command line
            line = None if type(error) in SYSTEM else of_hydra(error) or one_line(error)
            if line is None:
                raise
            raise ValueError(said_of(of_sweep(line, overrides), overrides)) from error
    outcomes = list(sweep.outcomes.values()) or job.outcomes
    for outcome in outcomes:
        # a job in another process or on another machine told it there, if anywhere
        if outcome.line and not (outcome.told and job.outcomes):
            say(f"error: {outcome.line}")
    wrong = [outcome.code for outcome in outcomes if outcome.code != OK]
    if wrong and len(outcomes) > 1:
        say(f"{len(wrong)} of {len(outcomes)} runs failed")
    return min(wrong, default=OK)


def _alone(name: str, words: Sequence[str]) -> None:
    """Refuse what several processes would each do as a whole."""
    size = launched().size
    if size == 1:
        return
    if name != "train":
        raise ValueError(f"{name} is the work of one process, got WORLD_SIZE={size}; train takes several")
    if {"-m", "--multirun"} & set(words):
        raise ValueError(
            f"-m must be started by one process, which starts one for each run, got WORLD_SIZE={size}; "
            f"leave -m out, or start the sweep without torchrun"
        )


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
def _swept(sweep: Sweep) -> Iterator[None]:
    """Whatever launcher is asked for, it works for the sweep: Hydra hands what jobs returned to the sweeper alone."""
    launcher, sweeper = Plugins.instantiate_launcher, Plugins.instantiate_sweeper
    made: list[Any] = []

    def keeping(self: Plugins, **given: Any) -> Sweeper:
        made.append(None)
        found = sweeper(self, **given)
        made[-1] = found
        return found

    def sweeping(
        self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        inner = launcher(self, hydra_context, task_function, config)
        return Sweeping(inner, sweep, hydra_context, config, lambda: getattr(made[-1], "overrides", None))

    with _replaced(Plugins, instantiate_launcher=sweeping, instantiate_sweeper=keeping):
        yield
