"""How far trainings are: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from attention_zoo.jobs.trainings import RunEvent
from attention_zoo.measure.kept import number
from attention_zoo.report import rows as results
from attention_zoo.report import units
from attention_zoo.results.row import Row

SILENCE_S = 20.0
"""Without a terminal, a line at least this often while trainings go on."""


class TrainingProgress:
    """Give it to `run_trainings` as `on_event`: a bar in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self.console, self.skipped, self.spoke = console, 0, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("training", total=1.0, left="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: RunEvent) -> None:
        left = "" if event.remaining_s is None else f"about {units.seconds(event.remaining_s)} left"
        said = f"{event.done} of {event.total} trained"
        self._bar.update(self._task, completed=event.share, description=said, left=left)
        if event.kind == "skipped":
            self.skipped += 1
        elif event.kind == "finished" and event.row is not None and event.run is not None:
            self.say(f"[{event.done}/{event.total}] {event.run.name}: {outcome(event.row)}")
        elif not self.console.is_terminal and time.monotonic() - self.spoke > SILENCE_S:
            self.say(f"{said}, {event.share:.0%} of all steps{', ' if left else ''}{left}")

    def say(self, line: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def outcome(row: Row) -> str:
    """A training row in words."""
    if not results.ok(row):
        return results.why(row)
    figures = ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3f}' if number(value) else value}"
        for name, value in row["metrics"].items()
    )
    return f"{figures}; {row['steps']:,} steps in {units.seconds(row['train_seconds'])}"
