"""What trainings will take: minutes, memory and disk, from rows of their like, or from a step that is timed now.

Runs that differ in seed and steps alone are alike. What a step took is kept beside the sweep, so that nobody waits for
it twice.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from attention_zoo.files import Damaged, plain, read_json, write_json
from attention_zoo.jobs.cell import Cell
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.identity import identity
from attention_zoo.measure.kept import number
from attention_zoo.measure.nursery import Nursery
from attention_zoo.report import units
from attention_zoo.training.records import RESULT, read_row

KEPT = "needs.json"
START = "start of a process"
"""Key of its seconds beside the timed steps, with the machine."""
BUDGET_S = 60.0
"""After which no further step is timed: what is left is taken to be like the others."""
PATIENCE_S = 60.0
"""For one of them."""


@dataclass(frozen=True)
class Need:
    """Of one training.

    Fields:
        source: "measured" (a row of its like), "timed" (a step), "failing" (it has no first step) or "guessed" (the
            mean of the others).
    """

    seconds: float
    peak_bytes: int | None
    disk_bytes: int | None
    source: str


def start_seconds(kept: Path | None, nursery: Nursery) -> float:
    """Seconds that a process takes here until it could train: mostly those of importing torch. Measured once a machine.

    Args:
        kept: folder in which it is kept; None: nothing is written.
        nursery: that measures it, if it is not kept, by being started.
    """
    path, key = kept and kept / KEPT, f"{START} on {socket.gethostname()}"
    known = _read(path)
    if number(known.get(key)):
        return float(known[key])
    began = time.monotonic()
    nursery.call("attention_zoo.jobs.alone:ready", {}, timeout_s=PATIENCE_S)
    seconds = time.monotonic() - began
    if path is not None:
        write_json(path, plain({**known, key: seconds}))
    return seconds


def needs(
    cells: Sequence[Cell], kept: Path | None, nursery: Nursery, *, threads: int, timing: bool = True
) -> list[Need | None]:
    """What each cell will take; None where nothing is known.

    Args:
        kept: folder in which timed steps are kept; None: nothing is written.
        nursery: of the processes that steps are timed in.
        threads: of torch, where a config leaves them to the machine.
        timing: whether a step may be timed here: no, where the cells will run elsewhere.
    """
    alike = [_alike(cell, threads) for cell in cells]
    timed = _timed(dict(zip(alike, cells)) if timing else {}, kept and kept / KEPT, nursery)
    measured = dict(_measured({cell.folder.parent for cell in cells}, threads))
    found = [_need(cell, timed.get(name), measured.get(name)) for name, cell in zip(alike, cells)]
    known = [each for each in found if each is not None]
    if not known:
        return found
    steady = [each.seconds for each in known if each.source != "failing"]
    mean = sum(steady) / max(1, len(steady))
    most = max((each.peak_bytes for each in known if each.peak_bytes), default=None)
    disk = max((each.disk_bytes for each in known if each.disk_bytes), default=None)
    return [each or Need(mean, most, disk, "guessed") for each in found]


def summary(
    found: Sequence[Need | None], total: int, finished: int, parallel: int, *, refused: int = 0, before: float = 0.0
) -> str:
    """How many cells there are and what those that are left will take, in one line.

    Args:
        found: of those that are left.
        total, finished: how many there are, and how many of these are finished.
        parallel: at a time.
        refused: how many have configs that cannot be meant: they take no time, and end as failed.
        before: seconds until the first of them begins.
    """
    said = f"{total} {'cell' if total == 1 else 'cells'}"
    if finished:
        said += f", {finished} of them finished"
    if refused:
        said += f", {refused} of them refused"
    known = [each for each in found if each is not None]
    if not found:
        return f"{said}: nothing is left to do"
    if len(known) < len(found):
        return f"{said}; what they will take is not known before the first is through"
    seconds = [each.seconds for each in known]
    most = before + max(sum(seconds) / parallel, *seconds)
    parts = [f"about {units.seconds(most)} with {min(parallel, len(found))} at a time"]
    peaks = [each.peak_bytes for each in known if each.peak_bytes is not None]
    disks = [each.disk_bytes for each in known if each.disk_bytes is not None]
    if peaks:
        parts.append(f"{units.size(max(peaks))} of memory each at most")
    if len(disks) == len(known):
        parts.append(f"{units.size(sum(disks))} of disk")
    sources = [each.source for each in known]
    words = {
        "measured": "measured before", "timed": "from a timed step", "failing": "that will fail",
        "guessed": "taken to be like the others",
    }  # fmt: skip
    how = ", ".join(f"{sources.count(key)} {word}" for key, word in words.items() if key in sources)
    return f"{said}: {', '.join(parts)} ({how})"


def _read(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else read_json(path)
    except (Damaged, FileNotFoundError):
        return {}


def _alike(cell: Cell, threads: int) -> str:
    config = {key: value for key, value in cell.config.items() if key not in ("seed", "steps", "threads")}
    return identity(plain(config), device="", threads=cell.config.get("threads") or threads)


def _need(cell: Cell, timed: dict[str, Any] | None, measured: tuple[float, float] | None) -> Need | None:
    steps, peak, disk = cell.config["steps"], None, None
    if timed:
        peak, disk = timed.get("peak_bytes"), timed.get("disk_bytes")
    once = sum(timed.get(name) or 0.0 for name in ("start_seconds", "around_seconds")) if timed else 0.0
    if measured is not None:
        return Need(once + steps * measured[0] + measured[1], peak, disk, "measured")
    if not timed:
        return None
    if "error" in timed:
        return Need(once, None, 0, "failing")
    trainer = cell.config["trainer"]
    evaluations = -(-steps // trainer["eval_every"])  # the last one included
    seconds = steps * timed["step_seconds"] + evaluations * timed["evaluation_seconds"]
    seconds = min(seconds, trainer["max_seconds"] or seconds) + timed["scoring_seconds"]
    return Need(once + seconds, peak, disk, "timed")


def _measured(folders: set[Path], threads: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """Seconds of a step, evaluations included, and of all that is scored once, by what is alike, of the runs that have
    ended well there."""
    for path in (path for folder in folders for path in folder.glob(f"*/{RESULT}")):
        try:
            row = read_row(path)
            if row["status"] == "ok" and number(row.get("wall_seconds")) and row["steps"] > 0:
                found = row["wall_seconds"] / row["steps"], row.get("scoring_seconds") or 0.0
                yield _alike(Cell(row["config"], path.parent), threads), found
        except (Damaged, FileNotFoundError, TypeError):  # the report names what cannot be read
            continue


def _timed(cells: dict[str, Cell], path: Path | None, nursery: Nursery) -> dict[str, dict[str, Any]]:
    """What a step takes of each, timed where it is not kept."""
    known, failing = _read(path), dict[str, dict[str, Any]]()
    began, new = time.monotonic(), False
    for name, cell in cells.items():
        if name in known or time.monotonic() - began > BUDGET_S:
            continue
        given = {"config": json.loads(json.dumps(plain(cell.config))), "steps": 1, "wholly": True}
        called = time.monotonic()
        found = nursery.call("attention_zoo.training.timing:timed_steps", given, timeout_s=PATIENCE_S)
        if isinstance(found, Ended):
            continue  # the run will say so, in its row
        if "error" in found:  # as a run does; another try may be after it was mended
            failing[name] = {"error": found["error"], "around_seconds": time.monotonic() - called}
            continue
        # beside what the process does itself: to fork it, and to hear of it
        beside = max(0.0, time.monotonic() - called - found.get("all_seconds", float("inf")))
        around = (found.get("around_seconds") or 0.0) + beside
        known[name], new = {**found, "step_seconds": fmean(found["seconds"]), "around_seconds": around}, True
    if new and path is not None:
        write_json(path, plain(known))
    return failing | {name: known[name] for name in cells if isinstance(known.get(name), dict)}
