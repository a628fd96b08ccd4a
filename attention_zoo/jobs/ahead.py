"""What a comparison or a benchmark will take, in one line, before it is begun."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attention_zoo.jobs.cell import Cell
from attention_zoo.jobs.needs import BUDGET_S, PATIENCE_S, needs, summary
from attention_zoo.jobs.plan import Planned
from attention_zoo.jobs.trainings import Run, finished, identity_of
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.cells import read_cells
from attention_zoo.measure.ends import is_kept
from attention_zoo.measure.environment import usable_cores
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.predict import expected_wall_s
from attention_zoo.report import units
from attention_zoo.results.row import Row
from attention_zoo.training.config import check


def cells_ahead(
    cells: Sequence[SpeedCell], folder: Path, nursery: Nursery, budget_s: float, *, retry: str | None, force: bool
) -> tuple[str, float | None]:
    """How many cells there are to measure, in words, and the seconds that these will take; None where unknown.

    Where nothing of theirs is measured yet, the shortest of each series is called once, and not kept.

    Args:
        folder: of the rows.
        budget_s, retry, force: see `run_cells`.
    """
    rows = {row["id"]: row for row in read_cells(folder, lambda line: None)}
    done = [(cell, rows[name]) for cell in cells if (name := cell.identity()) in rows and is_kept(rows[name], retry)]
    done = [] if force else done
    there = {cell.identity() for cell, _ in done}
    left = [cell for cell in cells if cell.identity() not in there]
    said = f"{len(cells)} cells to measure" + (f", {len(done)} of them finished" if done else "")
    if not left:
        return said, 0.0
    known = done or [(cell, row) for cell, row in _called(left, nursery) if row["status"] == "ok"]
    return said, expected_wall_s(left, known, budget_s)


def _called(cells: Sequence[SpeedCell], nursery: Nursery) -> list[tuple[SpeedCell, Row]]:
    """The shortest of each series, called once."""
    shortest: dict[Any, SpeedCell] = {}
    for cell in sorted(cells, key=lambda cell: cell.length):
        shortest.setdefault(cell.series(), cell)
    began, found = time.monotonic(), list[tuple[SpeedCell, Row]]()
    for cell in shortest.values():
        if time.monotonic() - began < BUDGET_S:
            started = time.monotonic()
            row = nursery.run(cell, timeout_s=PATIENCE_S, repeats=1, budget_s=0.0, observe=False)
            found.append((cell, {**row, "wall_seconds": time.monotonic() - started}))
    return found


def trainings_ahead(
    plans: Mapping[str, tuple[float | None, Sequence[Run]]], folder: Path, nursery: Nursery, *, parallel: int,
    retry: str | None,
) -> tuple[str, float | None, str]:  # fmt: skip
    """How many trainings there are, in words, the seconds that those will take, and memory and disk in words.

    Args:
        plans: the seconds that a plan's trainings may take together, where it says so, and the trainings.
        folder: of all runs.
    """
    threads, total, over, seconds, told = usable_cores(), 0, 0, 0.0, list[str]()
    unknown, peak, disk = False, 0, 0
    for most, runs in plans.values():
        cells = [Cell(run.config, run.within(folder)) for run in runs]
        left = [cell for cell in cells if finished(dict(cell.config), cell.folder, retry=retry) is None]
        total, over = total + len(cells), over + len(cells) - len(left)
        known = [each for each in needs(left, None, nursery, threads=threads) if each is not None]
        unknown |= len(known) < len(left) and most is None
        if known and most is None:
            seconds += max(sum(each.seconds for each in known) / parallel, *(each.seconds for each in known))
        elif left and most is not None:
            seconds += most * len(left) / len(cells)
        peak = max([peak, *(each.peak_bytes or 0 for each in known)])
        disk += sum(each.disk_bytes or 0 for each in known)
    said = f"{total} trainings" + (f", {over} of them finished" if over else "")
    if peak:
        told.append(f"{units.size(peak)} of memory each at most")
    if disk:
        told.append(f"{units.size(disk)} of disk")
    return said, None if unknown else seconds, ", ".join(told)


def planned_runs(runs: Sequence[Run], folder: Path) -> list[Planned]:
    """The trainings of a comparison, for its plan.

    Args:
        folder: of the comparison.
    """
    return [
        Planned(
            run.name, "training", str(run.within(folder.absolute() / "training")), id=identity_of(run.config),
            steps=run.config["steps"], tokens=run.config["batch"] * run.config["seq_len"],
        )
        for run in runs
    ]  # fmt: skip


def one_ahead(config: Mapping[str, Any], folder: Path) -> str:
    """What one training will take, in one line.

    Raises:
        ValueError: for a config that cannot be meant.
    """
    cell = Cell(check(config), folder)
    threads = torch.get_num_threads()
    left = [] if cell.result(time.time()) else [cell]
    with Nursery() as nursery:
        found = needs(left, None, nursery, threads=threads)
    return f"{summary(found, 1, 1 - len(left), 1)}; {folder}"


def in_words(parts: Sequence[str], seconds: Sequence[float | None], further: str = "") -> str:
    """One line."""
    known = [each for each in seconds if each is not None]
    took = f"about {units.seconds(sum(known))}" if sum(known) else "nothing is left to do"
    if len(known) < len(seconds):
        took = "how long is not known yet"
    return f"{' and '.join(parts)}: {took}{', ' if further else ''}{further}"
