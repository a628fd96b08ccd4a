"""Beside a launcher that works: tells its workers when to stop, and the user how far the cells are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from attention_zoo.files import Damaged
from attention_zoo.jobs.cell import Cell
from attention_zoo.jobs.plan import PLAN, read_plan
from attention_zoo.jobs.progress import outcome
from attention_zoo.jobs.states import remaining_s, states
from attention_zoo.report import units
from attention_zoo.training.records import RESULT, read_row
from attention_zoo.words import say

LOOK_S = 0.3
SAY_S = 2.0
"""Between two looks at how far all are; without a terminal nobody is told."""


class Watch:
    """A context, around the launcher's work.

    Args:
        cells: that are to be done, by name.
        total: cells of the whole sweep.
        plan: its folder.
        stop: the file by which workers are told.
        asked: whether this process was asked to stop.
    """

    def __init__(self, cells: Mapping[str, Cell], total: int, plan: Path, stop: Path, asked: Callable[[], Any]):
        self.cells, self.total, self.plan, self.stop, self.asked = dict(cells), total, plan, stop, asked
        self.console = Console()
        self.written = {name: _written(cell) for name, cell in cells.items()}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("cells", total=total, left="")
        self.wrong: set[str] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch the sweep")

    def __enter__(self) -> None:
        self.bar.start()
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self.stop.unlink(missing_ok=True)
        self._speak(self._tell)
        self._speak(self.bar.stop)

    def _run(self) -> None:
        """It lasts as long as the sweep, whatever becomes of its words: without it nobody would hear of a signal."""
        since = SAY_S
        while not self.over.wait(LOOK_S):
            if self.asked():
                with suppress(OSError):  # a full disk: the others then end with this process
                    self.stop.touch()
            self._speak(self._tell)
            since += LOOK_S
            if self.console.is_terminal and since >= SAY_S:
                since = 0.0
                self._speak(self._advance)

    def _speak(self, words: Callable[[], None]) -> None:
        """Tell something, which is not worth a sweep: what is wrong with telling it is told once."""
        try:
            words()
        except SystemExit:  # by Rich, whose reader has gone (`... | head`): from now on it says nothing
            pass
        except Exception as error:
            if (wrong := f"{type(error).__name__}: {error}") not in self.wrong:
                self.wrong.add(wrong)
                say(f"how far the sweep is cannot be told: {wrong}")

    def _tell(self) -> None:
        """A line for each cell that has ended since the last look, whoever did it."""
        for name, cell in list(self.cells.items()):
            if _written(cell) in (None, self.written[name]):
                continue
            with suppress(Damaged, FileNotFoundError):  # who goes on says so
                row = read_row(cell.folder / RESULT)
                del self.cells[name]
                place = f"[{self.total - len(self.cells)}/{self.total}]"
                self.console.print(f"{place} {name}: {outcome(row)}", markup=False, highlight=False, soft_wrap=True)

    def _advance(self) -> None:
        with suppress(Damaged, FileNotFoundError):
            found = read_plan(self.plan / PLAN)
            now = states(self.plan, found.cells)
            left = remaining_s(now, found.parallel)
            said = f"{self.total - len(self.cells)} of {self.total} cells"
            about = "" if left is None else f"about {units.seconds(left)} left"
            self.bar.update(self.task, completed=sum(each.share for each in now), description=said, left=about)


def _written(cell: Cell) -> int | None:
    try:
        return (cell.folder / RESULT).stat().st_mtime_ns
    except OSError:
        return None
