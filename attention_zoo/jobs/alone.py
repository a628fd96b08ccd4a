"""One training in a process of its own, and what became of it, whatever that is.

A server that has imported everything forks the process (`measure.worker`), so that a sweep pays for the imports once. It
ends with whoever started it, and when it is asked to stop it saves where it is.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attention_zoo import stopping
from attention_zoo.files import plain
from attention_zoo.jobs.trainings import GRACE_S, LEAVE_S, data_of, identity_of, task_name
from attention_zoo.locks import Busy, owning
from attention_zoo.measure.ends import Ended, how_it_ended, oom_kills
from attention_zoo.measure.forked import kill_group
from attention_zoo.measure.kept import keep_row
from attention_zoo.measure.servers import Gone, Scratch, Server
from attention_zoo.results.row import Row
from attention_zoo.training.records import RESULT, lost_row
from attention_zoo.training.run import run_training

POLL_S = 0.1


class Trainings:
    """Trains one run after the other, each in a fresh process. Close it; a parent that dies takes all along."""

    def __init__(self) -> None:
        self._server: Server | None = None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def train(self, config: Mapping[str, Any], folder: str | Path, *, threads: int, look: Callable[[], None]) -> Row:
        """Train one.

        Args:
            config: composed conf/train.yaml as plain values.
            folder: of this run alone.
            threads: of torch, where the config leaves them to the machine.
            look: called a few times a second; what it raises asks the run to stop, and is raised again when it has.

        Returns:
            the row of the run: its own, or one that says how its process ended. Only one that ended by itself is kept
            as its result; a run that was stopped goes on from its checkpoint.
        """
        given = {"config": dict(config), "folder": str(folder), "threads": threads}
        answer, said = Scratch(), Scratch()
        try:
            found = self._child(given, answer, said, _limit_s(config), look)
        finally:
            row = _last_line(answer)
            answer.close()
            said.close()
        # what it told before it ended is worth more than how it ended
        return row if row is not None and found.status == "ok" else _unfinished(config, folder, found)

    def _child(
        self, given: dict[str, Any], answer: Scratch, said: Scratch, limit_s: float, look: Callable[[], None]
    ) -> Ended:
        """Start it and wait for its end; "ok" for exit code 0."""
        kills, began = oom_kills(), time.monotonic()
        asked = {"function": "attention_zoo.jobs.alone:train", "given": given, "seconds": None}
        try:
            server, child = self._begin(asked, answer, said)
        except Gone as gone:
            return gone.ended
        try:
            while True:
                with suppress(TimeoutError):
                    code = server.hear(POLL_S)["exit"]
                    break
                look()
                if time.monotonic() - began > limit_s:
                    self._discard(child)
                    return Ended("timeout", f"not through within {limit_s:g} s")
        except Gone as gone:
            self._discard(child)
            return gone.ended
        except BaseException:  # asked to stop: it saves where it is, unless a second signal comes
            try:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
                with suppress(TimeoutError, Gone):
                    server.hear(LEAVE_S)
            finally:
                self._discard(child)
            raise
        if code in (stopping.REQUEUE, stopping.CTRL_C):
            return Ended("lost", "asked to stop from outside; the next call goes on from its checkpoint")
        how = how_it_ended(code, said.end().decode(errors="replace"), killed_for_memory=oom_kills() > kills)
        return Ended("ok", "") if code == 0 and _last_line(answer) is not None else how

    def _begin(self, asked: dict[str, Any], answer: Scratch, said: Scratch) -> tuple[Server, int]:
        """Have a child started; returns its parent and its process id. One more try: a server may die idle."""
        for last in (False, True):
            if self._server is None:
                self._server = Server("attention_zoo.measure.worker")
            try:
                return self._server, self._server.ask(asked, (answer.descriptor, said.descriptor))["pid"]
            except Gone:
                self._discard()
                if last:
                    raise
        raise AssertionError("unreachable")

    def _discard(self, child: int | None = None) -> None:
        """End the server, which will not be asked again, and its child with all that this has started."""
        if child is not None:
            kill_group(child)
        if self._server is not None:
            self._server.kill()
            self._server = None


def train(config: dict[str, Any], folder: str, threads: int) -> dict[str, Any]:
    """What the forked process does; returns the row."""
    stopping.install()
    torch.set_num_threads(threads)
    try:
        # somebody may have begun it by another command since it was claimed
        return dict(run_training(config, folder, wait_s=float("inf")))
    except KeyboardInterrupt as stop:
        os._exit(stop.code if isinstance(stop, stopping.Stopped) else stopping.CTRL_C)


def _limit_s(config: Mapping[str, Any]) -> float:
    budget = config["trainer"].get("max_seconds")
    return float("inf") if budget is None else 3 * budget + GRACE_S


def _last_line(answer: Scratch) -> Row | None:
    with suppress(ValueError):  # it ended before it had written, or somebody else wrote
        row = json.loads(answer.all().rpartition(b"\n")[2])
        if isinstance(row, dict):
            return row
    return None


def _unfinished(config: Mapping[str, Any], folder: str | Path, ended: Ended) -> Row:
    """The row of a run that gave none. One that was lost is no result: what it has saved says that it was begun."""
    row = plain(lost_row(config, identity_of(config), ended, task=task_name(config), data=data_of(config)))
    if ended.status != "lost":
        with suppress(Busy), owning(folder):  # who writes there by now knows better
            keep_row(Path(folder) / RESULT, row)
    return row
