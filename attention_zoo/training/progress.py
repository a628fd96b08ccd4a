"""What a person sees while a run goes on: a bar with time left in a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from attention_zoo.contract import one_of
from attention_zoo.words import say, silence

KINDS = ("auto", "bar", "lines", "none")
LINE_SECONDS = 10.0
"""Plain lines come at most this often."""


class Progress:
    """Progress of one run, as a context.

    Args:
        label: what runs.
        total: number of steps.
        kind: "bar", "lines", "none", or "auto": a bar where standard error is a terminal, lines elsewhere.
    """

    def __init__(self, label: str, total: int, kind: str = "auto"):
        one_of(KINDS, progress=kind)
        self.console = Console(stderr=True, highlight=False)
        self.label, self.total = label, total
        self.warnings: list[str] = []
        self.kind = ("bar" if self.console.is_terminal else "lines") if kind == "auto" else kind
        self.spoke = self.began = time.monotonic()
        self.first: int | None = None
        self.bar: Bar | None = None
        if self.kind == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.bar_task = self.bar.add_task(label, total=total, figures="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            with _whoever_looks():
                self.bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Say that `step` steps are done."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.began = step, now  # a resumed run's time left is that of the steps done here
        figures = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=step, figures=figures)
        elif self.kind == "lines" and now - self.spoke >= LINE_SECONDS:
            self.spoke = now
            rate = (step - self.first) / (now - self.began) if step > self.first else 0.0
            left = f", {(self.total - step) / rate:.0f} s left" if rate else ""
            self.notice(f"step {step}/{self.total}: {figures}{left}")

    def notice(self, line: str) -> None:
        """Show one line, unless nothing is to be shown."""
        if self.bar is not None:
            with _whoever_looks():
                self.bar.console.print(f"{self.label}: {line}", markup=False, soft_wrap=True)
        elif self.kind == "lines":
            say(f"{self.label}: {line}")

    def warn(self, line: str) -> None:
        """Show one line that nobody must miss, also where nothing else is shown; it is kept in `warnings`."""
        self.warnings.append(line)
        if self.kind == "none":
            say(f"{self.label}: {line}")
        else:
            self.notice(line)


@contextmanager
def _whoever_looks() -> Iterator[None]:
    """A stretch that draws on a terminal, which may be closed: that is no fault of the run."""
    try:
        yield
    except (OSError, SystemExit):  # Rich ends the program for a broken pipe
        silence()


class Silent(Progress):
    """Of a process that another one speaks for: shows nothing."""

    def __init__(self, label: str):
        super().__init__(label, 0, "none")

    def warn(self, line: str) -> None:
        self.warnings.append(line)
