"""What a launcher calls with the config of one job, in this process, in another, or on another machine."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from attention_zoo import stopping
from attention_zoo.commands.launch import ending
from attention_zoo.commands.work import COMMANDS, Outcome
from attention_zoo.jobs.plan import COMMAND


@dataclass
class Control:
    """What all jobs of a sweep of cells have in common.

    Fields:
        since: when the sweep began, in seconds since 1970.
        threads: of torch in the process that began it.
        stop: a file; once it is there, whoever works stops.
        places: the folder of each cell, by `key_of`, as the process that began it names it.
        parent: process that began it.
    """

    since: float
    threads: int
    stop: Path
    places: dict[str, str] = field(default_factory=dict)
    parent: int = field(default_factory=os.getpid)


class Job:
    """It never raises an error of the job: the others of a sweep go on.

    Args:
        name: of the command.
        debug: show the traceback of every error.
        command: as it was typed.

    Attributes:
        control: of a sweep whose jobs are cells.
        patient: whether to wait for what somebody else does.
        outcomes: of the jobs that were done in this process.
    """

    def __init__(self, name: str, debug: bool, command: str):
        self.name, self.debug, self.command = name, debug, command
        self.control: Control | None = None
        self.patient = False
        self.outcomes: list[Outcome] = []

    def __call__(self, composed: DictConfig) -> Outcome:
        COMMAND.set(self.command)
        try:
            _given(composed)
            outcome = COMMANDS[self.name].run(composed) if self.control is None else self._cell(composed, self.control)
        except Exception as error:
            if self.debug:
                traceback.print_exception(error)
            outcome = Outcome(*ending(error))
        self.outcomes.append(outcome)
        return outcome

    def _cell(self, composed: DictConfig, control: Control) -> Outcome:
        make, hydra = COMMANDS[self.name].cell, HydraConfig.get()
        assert make is not None
        beneath = os.getppid() == control.parent
        if beneath:
            _end_after(control.parent)

        def look() -> None:
            # a worker whose parent was killed would go on for ever, with nobody who wants what it does
            if control.stop.exists() or (beneath and os.getppid() != control.parent):
                raise stopping.Stopped(signal.SIGTERM)

        cell = make(composed, hydra).within(control.places.get(" ".join(hydra.overrides.task)))
        try:
            with _WORKING, nullcontext() if os.getpid() == control.parent else _stopped_by_parent():
                row = cell.work(control.since, nursery(), threads=control.threads, patient=self.patient, look=look)
        except stopping.Stopped as stop:
            return Outcome(stop.code, state="stopped")
        return Outcome(state="busy") if row is None else Outcome.of(row, cell.folder)


@cache
def nursery() -> Any:
    """Of this process: all cells that come to it share the imports."""
    from attention_zoo.measure.nursery import Nursery

    return Nursery()


def end_nursery() -> None:
    """Where no further cell will come."""
    if nursery.cache_info().currsize:
        nursery().__exit__(None, None, None)
        nursery.cache_clear()


def _stopped_by_parent() -> AbstractContextManager[None]:
    """In a worker: a terminal's Ctrl-C comes to all, and the parent says when to stop. Other signals are for it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return stopping.beside()


_WORKING = threading.Lock()


@cache
def _end_after(parent: int) -> None:
    """End this worker when its parent is gone and the cell in hand is saved: a launcher's pool would wait for more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        with _WORKING:
            os._exit(stopping.REQUEUE)

    threading.Thread(target=watch, daemon=True, name="end with the sweep").start()


def _given(composed: DictConfig) -> None:
    """Refuse a config in which something is still to be given, naming all of it."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ValueError(f"{' and '.join(missing)} must be given, got ???")
