"""How far sweeps, comparisons and benchmarks are, and what would go on: what the command `status` shows.

Everything is read from the folders; whoever works there is not disturbed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text as Line

from attention_zoo.files import Damaged, read_json
from attention_zoo.jobs.plan import PLAN, Plan, Planned, read_plan
from attention_zoo.jobs.progress import outcome
from attention_zoo.jobs.states import KINDS, State, remaining_s, states
from attention_zoo.locks import CLAIMS, WRITES
from attention_zoo.measure import progress as measuring
from attention_zoo.report import units
from attention_zoo.results.check import wrong_to_keep
from attention_zoo.rules import shown
from attention_zoo.schemas import store
from attention_zoo.training.records import CHECKPOINT, METRICS, MODEL, RESULT

MOST = 20
"""Cells of one state that are listed one by one."""
COLOURS = {"running": "cyan", "lost": "magenta", "failed": "red", "waiting": "yellow", "done": "green"}


@dataclass
class StatusConfig:
    """conf/status.yaml.

    Fields:
        runs: a folder or a list of folders; everything beneath is looked at.
        watch: show it again and again until nothing is left to do, or Ctrl-C.
        every: seconds between two looks.
        all: list every cell, however many there are.
    """

    runs: Any = "runs"
    watch: bool = False
    every: Annotated[float, Field(gt=0, le=3600)] = 2.0
    all: bool = False


@dataclass(frozen=True)
class Job:
    """A plan with how far its cells are.

    Fields:
        folder: of the plan; of runs without one, of them all.
    """

    folder: Path
    plan: Plan
    found: list[State] = field(default_factory=list)

    def count(self) -> Counter[str]:
        return Counter(state.kind for state in self.found)


def register() -> None:
    """Make the schema known to Hydra, which conf/status.yaml names first."""
    store("status_schema", StatusConfig)


def status(config: StatusConfig, console: Console | None = None) -> list[Job]:
    """Show it; returns what was shown last.

    Raises:
        ValueError: for folders that are not there, or hold nothing of ours.
    """
    console = console or Console()
    folders = folders_of(config.runs)
    jobs = look(folders)
    if not config.watch:
        for part in page(jobs, everything=config.all).renderables:
            console.print(part, soft_wrap=isinstance(part, Line))  # a command is to be copied whole
        return jobs
    with Live(page(jobs, everything=config.all), console=console, auto_refresh=False) as live:
        while any(set(job.count()) & {"running", "lost", "waiting"} for job in jobs):
            time.sleep(config.every)
            jobs = look(folders)
            live.update(page(jobs, everything=config.all), refresh=True)
    return jobs


def folders_of(runs: Any) -> list[Path]:
    """The folders that `runs=` names.

    Raises:
        ValueError: where they are none.
    """
    given = [runs] if isinstance(runs, str) else list(runs) if isinstance(runs, Iterable) else [runs]
    if not given or not all(isinstance(each, str) and each for each in given):
        raise ValueError(f"runs must be a folder or a list of folders, got {shown(runs, 60)}")
    for each in given:
        if not Path(each).is_dir():
            raise ValueError(f"runs must name folders, got {each!r}, which is none")
    return [Path(each) for each in given]


def look(folders: Iterable[Path]) -> list[Job]:
    """All plans beneath some folders, and at the end the runs that are in none.

    Raises:
        ValueError: if there is neither.
    """
    jobs, planned, loose = [], set[Path](), list[Path]()
    folders = list(folders)
    for folder in folders:
        for path in _named(folder, PLAN):
            try:
                plan = read_plan(path)
            except (Damaged, FileNotFoundError):  # somebody else's file, or one that goes away just now
                continue
            jobs.append(Job(path.parent, plan, states(path.parent, plan.cells)))
            planned |= {(path.parent / each.place).resolve() for each in plan.cells}
        loose += [path.parent for path in _named(folder, RESULT, METRICS, WRITES.lock, CLAIMS.lock)]
    alone = [place for place in dict.fromkeys(loose) if place.resolve() not in planned and _is_run(place)]
    if alone:
        cells = [Planned(place.name, "training", str(place.absolute())) for place in alone]
        jobs.append(Job(folders[0], Plan("", os.getcwd(), cells), states(folders[0], cells)))
    if not jobs:
        raise ValueError(f"runs must hold sweeps, comparisons, benchmarks or runs, got {', '.join(map(str, folders))}")
    return jobs


def _named(folder: Path, *names: str) -> Iterator[Path]:
    for place, inner, files in os.walk(folder):
        inner.sort()
        yield from (Path(place) / name for name in names if name in files)


def _is_run(folder: Path) -> bool:
    """Whether a training has left this: many call a file result.json."""
    if (folder / METRICS).exists():
        return True
    if any((folder / name).exists() for name in (CHECKPOINT, MODEL, WRITES.lock, CLAIMS.lock)):
        return (folder / RESULT).exists()
    with suppress(Damaged, FileNotFoundError):
        return wrong_to_keep(read_json(folder / RESULT), "quality") is None
    return False


def page(jobs: Iterable[Job], *, everything: bool = False) -> Group:
    """What is shown: for each plan its cells, a line that sums them up, and the commands that would go on."""
    parts: list[RenderableType] = []
    for job in jobs:
        count = job.count()
        parts.append(Line(str(job.folder) if job.plan.command else f"{job.folder}: runs without a plan", style="bold"))
        parts.append(_table(job, everything))
        parts.append(Line(summary(job)))
        if count["lost"] or (count["waiting"] and not count["running"]):
            parts.append(_typed("goes on with", job.plan.again()))
        if count["failed"]:
            parts.append(_typed("failed ones again with", job.plan.again("retry=failed")))
        parts.append(Line())
    return Group(*parts[:-1])


def summary(job: Job) -> str:
    """A plan in one line: "12 cells: 5 done, 2 running, 5 waiting; about 14 min left"."""
    count = job.count()
    said = ", ".join(f"{count[kind]} {kind}" for kind in reversed(KINDS) if count[kind]) or "none"
    left = remaining_s(job.found, max(job.plan.parallel, count["running"]))
    end = "" if not (count["running"] or count["waiting"] or count["lost"]) else "; time left is not known yet"
    if left:
        end = f"; about {units.seconds(left)} left"
    return f"{len(job.found)} {'cell' if len(job.found) == 1 else 'cells'}: {said}{end}"


def _typed(what: str, command: str) -> Line:
    return Line(f"{what}: {command}" if command else f"{what} the command that began them")


def _table(job: Job, everything: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, rule in (("state", {}), ("cell", {"overflow": "fold"}), ("done", {"justify": "right"}),
                       ("left", {"justify": "right"}), ("", {"overflow": "fold"})):  # fmt: skip
        table.add_column(name, **rule)  # type: ignore[arg-type]
    for kind in KINDS:
        found = [state for state in job.found if state.kind == kind]
        most = len(found) if everything else MOST
        for state in found[:most]:
            left = units.seconds(state.left_s) if state.left_s and kind == "running" else ""
            cells = (kind, state.planned.name, f"{state.share:.0%}", left, _note(state))
            table.add_row(Line(cells[0], style=COLOURS[kind]), *map(Line, cells[1:]))
        if len(found) > most:
            table.add_row(Line(kind, style=COLOURS[kind]), Line(f"and {len(found) - most} more"))
    return table


def _note(state: State) -> str:
    if state.row is None:
        return state.who
    return outcome(state.row) if state.planned.kind == "training" else measuring.outcome(state.row)
