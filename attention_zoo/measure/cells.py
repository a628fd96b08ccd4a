"""Run many cells, each in a fresh process, one at a time; keep every row; never measure twice what is measured.

    rows = run_cells([SpeedCell("full", 1024), SpeedCell("longformer", 1024)], "results")

Running out of memory, out of time or crashing is a row like any other. Rows lie in `<folder>/cells/<id>.json`, written
whole or not at all, so that a run that was cut off goes on where it stopped. A cell whose process was ended from
outside is measured again by the next call, and so is one whose file cannot be read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from attention_zoo.files import plain
from attention_zoo.measure.cell import SpeedCell, blank_row, run_cell
from attention_zoo.measure.ends import check_retry, is_kept
from attention_zoo.measure.kept import keep_row, read_rows
from attention_zoo.measure.nursery import WIDER, Nursery
from attention_zoo.measure.predict import expected_wall_s, over_budget, too_slow
from attention_zoo.results.row import Limits, Row, SpeedRow, no_figures
from attention_zoo.words import say

__all__ = ["CellEvent", "SpeedCell", "read_cells", "run_cell", "run_cells"]


@dataclass(frozen=True)
class CellEvent:
    """What `run_cells` tells while it runs.

    Fields:
        kind: "skipped" (finished before), "stale" (an older row came from other code and is measured again),
            "started" or "finished" (row is there).
        index, total: place of the cell, from 0, and number of all cells.
        cell: which one.
        row: its row; for "stale" the older one; None for "started".
        remaining_s: seconds until all are through, as far as one can tell; None before anything is known.
    """

    kind: Literal["skipped", "stale", "started", "finished"]
    index: int
    total: int
    cell: SpeedCell
    row: Row | None
    remaining_s: float | None


def run_cells(
    cells: Sequence[SpeedCell],
    folder: str | Path,
    *,
    timeout_s: float = 120.0,
    memory_limit_bytes: int | None = None,
    repeats: int = 5,
    budget_s: float = 4.0,
    force: bool = False,
    retry: str | None = None,
    profile: bool = False,
    on_event: Callable[[CellEvent], None] | None = None,
    on_bad: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure cells one after the other, shorter lengths first, so that longer ones can be judged by them.

    Args:
        cells: what to measure; doubles are measured once.
        folder: rows are kept in `<folder>/cells/`.
        timeout_s: for each cell, infinity: as long as it takes; the imports, shared by all, do not count.
        memory_limit_bytes: what a cell may take beyond the loaded libraries, inputs and parameters included. None: no
            limit, and no prediction but from shorter cells that failed.
        repeats, budget_s: see `speed.time_call`.
        force: measure finished cells again.
        retry: "failed" measures again what failed, ran out of memory or timed out. None: these are results; what ran
            out of something is measured again only where there is more of it.
        profile: write a Chrome trace of one call of each cell to `<folder>/traces/`; see `row["trace"]`.
        on_event: called at every step.
        on_bad: told about each file among the rows that cannot be read, in one line; default: standard error.

    Returns:
        The rows in the order of `cells`.

    Raises:
        ValueError: for an unknown backend or a device that this machine lacks, before anything runs.
        OSError: if a row cannot be written, naming its file.
    """
    check_retry(retry)
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    names = [cell.identity() for cell in cells]
    todo = sorted(dict(zip(names, cells)).items(), key=lambda item: item[1].length)
    kept = {row["id"]: row for row in read_cells(folder, on_bad)}
    limits: Limits = {
        "timeout_s": None if math.isinf(timeout_s) else timeout_s,
        "memory_limit_bytes": memory_limit_bytes,
    }
    trace = str(Path(folder) / "traces") if profile else None
    how: dict[str, Any] = {
        "memory_limit_bytes": memory_limit_bytes,
        "repeats": repeats,
        "budget_s": budget_s,
        "trace": trace,
    }
    done: list[tuple[SpeedCell, Row]] = []
    found: dict[str, Row] = {}

    with Nursery() as nursery:
        for index, (name, cell) in enumerate(todo):

            def tell(kind: Any, row: Row | None, left: int) -> None:
                if on_event is not None:
                    waiting = expected_wall_s([other for _, other in todo[left:]], done, budget_s)
                    on_event(CellEvent(kind, index, len(todo), cell, row, waiting))  # noqa: B023  (called at once)

            row = kept.get(name)
            final = row is not None and not force and _is_final(row, limits, retry)
            if row is not None and final and not (profile and _lacks_trace(row)):
                found[name] = row
                done.append((cell, row))
                tell("skipped", row, index + 1)
                continue
            if row is None and (older := _older(cell, kept.values())):
                tell("stale", older, index)
            tell("started", None, index)
            started = time.perf_counter()
            row = _predicted(cell, done, memory_limit_bytes) or nursery.run(cell, timeout_s=timeout_s, **how)
            row = plain({**row, "wall_seconds": time.perf_counter() - started, "limits": limits})
            # By the row's own id: it says so if somebody edited the code while we measured.
            keep_row(Path(folder) / "cells" / f"{row['id']}.json", row)
            found[name] = row
            done.append((cell, row))
            tell("finished", row, index + 1)
    return [found[name] for name in names]


def read_cells(folder: str | Path, on_bad: Callable[[str], None] | None = None) -> list[Row]:
    """All rows kept in a folder, of whatever code; see `row["environment"]["source"]`.

    Args:
        on_bad: told about each file that holds no such row, in one line; default: standard error.
    """
    rows = read_rows(Path(folder) / "cells", "speed", on_bad or _complain)
    return [{**no_figures(), **row} for row in rows]


def _complain(line: str) -> None:
    say(line)


def _is_final(row: Row, limits: Limits, retry: str | None) -> bool:
    """Whether the row of an earlier call stands. A limit of then may be wider now."""
    if not is_kept(row, retry):
        return False
    if row["status"] in ("oom", "oom_predicted"):
        return _as_wide(row["limits"]["memory_limit_bytes"], limits["memory_limit_bytes"])
    if row["status"] == "timeout":
        return _as_wide(row["limits"]["timeout_s"], limits["timeout_s"])
    return True


def _lacks_trace(row: Row) -> bool:
    return row["status"] == "ok" and not row["trace"]


def _as_wide(then: float | None, now: float | None) -> bool:
    return then is None or (now is not None and now <= WIDER * then)


def _older(cell: SpeedCell, rows: Any) -> Row | None:
    config = asdict(cell)
    return next((row for row in rows if row["config"] == config), None)


def _predicted(cell: SpeedCell, done: Any, limit_bytes: int | None) -> SpeedRow | None:
    excess = over_budget(cell, done, limit_bytes)
    if excess is not None:
        return {**blank_row(cell, "oom_predicted", excess.why), "predicted_bytes": excess.predicted_bytes}
    reason = too_slow(cell, done)
    return None if reason is None else blank_row(cell, "timeout", reason)
