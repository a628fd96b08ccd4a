"""Signals to any process of a command's tree, at any moment, again and again; commands that have ended begin anew."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

from . import Counts
from .cells import _left, _marked, _orphans, _send

ENDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
MOST = 3
"""Signals in one try's course."""
LOST = 3
"""Kills of the same cell after which its command may say that it is lost, with exit code 1."""
PATIENCE_S = 400.0
"""For machines under load; an undisturbed command takes a twentieth."""

Found = Iterator[tuple[str, str]]


class Disturbed:
    """Commands at work on the same, and what is done to them.

    Args:
        rng: draws parents, moments, signals and whom they hit.
        start: begins a command.
        begun: whether there is anything yet that a signal could hurt.
        finished: when each cell was finished that is.
        counts: gets a try for each signal.

    Attributes:
        case: what was done, in words.
        done: when each cell was finished that was, at any moment so far.
    """

    def __init__(
        self, rng: random.Random, start: Callable[[], subprocess.Popen[str]], begun: Callable[[], bool],
        finished: Callable[[], dict[str, int]], counts: Counts,
    ):  # fmt: skip
        self.rng, self.start, self.begun, self.finished, self.counts = rng, start, begun, finished, counts
        self.case, self.done, self.kills = "", dict[str, int](), 0
        self.jobs = list[subprocess.Popen[str]]()
        self.got = dict[int, set[signal.Signals]]()

    def run(self) -> Found:
        """Do it all, and tell what went wrong."""
        parents = self.rng.choice((1, 2))
        self.case = f"{parents} parents"
        with _marked() as mark:
            self.jobs = [self.start() for _ in range(parents)]
            until = time.monotonic() + PATIENCE_S
            while not self.begun() and time.monotonic() < until and self.jobs[0].poll() is None:
                time.sleep(0.05)
            for _ in range(self.rng.randint(1, MOST)):
                time.sleep(self.rng.uniform(0, 8))
                if all(job.poll() is not None for job in self.jobs):
                    self.jobs.append(self.start())
                    time.sleep(self.rng.uniform(0, 12))
                self._send(mark)
            for job in self.jobs:
                yield from self._end(job)
            yield from _orphans(mark, self.case)
        self.done |= self.finished()

    def _send(self, mark: str) -> None:
        by, whom, every = self.rng.choice(ENDS), self.rng.choice(("a parent", "all", "one")), _left(mark)
        alive = [job.pid for job in self.jobs if job.poll() is None]
        if not every:  # all were through before
            return
        if whom == "all" and by == signal.SIGKILL:  # nobody is left to be judged
            whom = "one"
        chosen = {"all": every, "one": [self.rng.choice(every)], "a parent": [self.rng.choice(alive or every)]}[whom]
        self.case += f", {by.name} to {whom}"
        self.counts.tries += 1
        self.done |= {name: when for name, when in self.finished().items() if name not in self.done}
        for pid in chosen:
            self.got.setdefault(pid, set()).add(by)
            self.kills += pid not in alive
            _send(pid, by)

    def _end(self, job: subprocess.Popen[str]) -> Found:
        try:
            said = job.communicate(timeout=PATIENCE_S)[0]
        except subprocess.TimeoutExpired:
            yield "hung", f"{self.case}: a parent does not end"
            return
        if "Traceback" in said:
            yield "raw", f"{self.case}: {said[-500:]}"
        # who was not ended itself goes on without the dead; its last cells may have been the dead's to the end
        wanted = {0, *(CODES[by] for by in self.got.get(job.pid, ())), *(-by for by in self.got.get(job.pid, ()))}
        if job.returncode == 1 and self.kills >= LOST and "ended from outside" in said:
            return
        if job.returncode not in wanted:
            yield "lost", f"{self.case}: a parent ended with {job.returncode}: {said[-500:]}"
