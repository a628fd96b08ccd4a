"""Shows a measurement under way: one line for each cell that is through, and how long the rest will take."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from attention_zoo.measure.cells import CellEvent, SpeedCell
from attention_zoo.results.row import Row


class CellProgress:
    """Give it to `run_cells` as `on_event`. Without a terminal the lines come alone, without the bar.

    with CellProgress() as progress:
        run_cells(cells, folder, on_event=progress)
    """

    def __init__(self, console: Console | None = None):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.console = console or Console()
        self.kinds: Counter[str] = Counter()
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._progress.add_task("measuring", total=None, left="")

    def __enter__(self) -> CellProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: CellEvent) -> None:
        self.kinds[event.kind] += 1
        left = "" if event.remaining_s is None else f"about {_minutes(event.remaining_s)} left"
        completed = event.index + (event.kind in ("skipped", "finished"))
        name = "measuring" if event.kind != "started" else named(event.cell)
        self._progress.update(self._task, completed=completed, total=event.total, left=left, description=name)
        if event.kind == "finished" and event.row is not None:
            place = f"[{event.index + 1}/{event.total}]"
            left = f" ({left})" if left and not self.console.is_terminal else ""
            self.say(f"{place} {named(event.cell)}: {outcome(event.row)}{left}")
        elif event.kind == "stale":
            self.say(f"{named(event.cell)}: stale, measured with other code; again")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def named(cell: SpeedCell) -> str:
    """A cell in words: "full/dense 4096 forward_backward"."""
    return f"{cell.said} {cell.length} {cell.phase}"


def outcome(row: Row) -> str:
    """A row in words: "123 ms, 45.1 MiB" (of tensors, or resident where these were not observed), or why not."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    seconds = row["seconds"]
    took = f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    if row["peak_bytes"] is not None:
        return f"{took}, {row['peak_bytes'] / 2**20:,.1f} MiB"
    resident = row["resident_bytes"]
    return f"{took}, {resident / 2**20:,.1f} MiB resident" if resident is not None else took


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
