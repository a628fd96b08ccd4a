"""Run many cells, each in a fresh process, one at a time; keep every row; never measure twice what is measured.

    rows = run_cells([SpeedCell("full", 1024), SpeedCell("longformer", 1024)], "results")

Running out of memory, out of time or crashing is a row like any other. Rows lie in `<folder>/cells/<id>.json`, written
whole or not at all, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from attention_zoo.files import write_json
from attention_zoo.measure.cell import SpeedCell, blank_row, run_cell
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.predict import expected_wall_s, over_budget, too_slow

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
    row: dict[str, Any] | None
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
    profile: bool = False,
    on_event: Callable[[CellEvent], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure cells one after the other, shorter lengths first, so that longer ones can be judged by them.

    Args:
        cells: what to measure; doubles are measured once.
        folder: rows are kept in `<folder>/cells/`.
        timeout_s: for each cell; the imports, shared by all, do not count.
        memory_limit_bytes: what a cell may take beyond the loaded libraries, inputs and parameters included. None: no
            limit, and no prediction but from shorter cells that failed.
        repeats, budget_s: see `speed.time_call`.
        force: measure finished cells again.
        profile: write a Chrome trace of one call of each cell to `<folder>/traces/`; see `row["trace"]`.
        on_event: called at every step.

    Returns:
        The rows in the order of `cells`.

    Raises:
        ValueError: for an unknown backend or a device that this machine lacks, before anything runs.
    """
    names = [cell.identity() for cell in cells]
    todo = sorted(dict(zip(names, cells)).items(), key=lambda item: item[1].length)
    kept = {row["id"]: row for row in read_cells(folder)}
    limits = {"timeout_s": timeout_s, "memory_limit_bytes": memory_limit_bytes}
    trace = str(Path(folder) / "traces") if profile else None
    how = {"memory_limit_bytes": memory_limit_bytes, "repeats": repeats, "budget_s": budget_s, "trace": trace}
    done: list[tuple[SpeedCell, dict[str, Any]]] = []
    found: dict[str, dict[str, Any]] = {}

    with Nursery() as nursery:
        for index, (name, cell) in enumerate(todo):

            def tell(kind: Any, row: dict[str, Any] | None, left: int) -> None:
                if on_event is not None:
                    waiting = expected_wall_s([other for _, other in todo[left:]], done, budget_s)
                    on_event(CellEvent(kind, index, len(todo), cell, row, waiting))  # noqa: B023  (called at once)

            row = kept.get(name)
            if row is not None and not force and _is_final(row, limits) and not (profile and _lacks_trace(row)):
                found[name] = row
                done.append((cell, row))
                tell("skipped", row, index + 1)
                continue
            if row is None and (older := _older(cell, kept.values())):
                tell("stale", older, index)
            tell("started", None, index)
            started = time.perf_counter()
            row = _predicted(cell, done, memory_limit_bytes) or nursery.run(cell, timeout_s=timeout_s, **how)
            row = {**row, "wall_seconds": time.perf_counter() - started, "limits": limits}
            # By the row's own id: it says so if somebody edited the code while we measured.
            write_json(Path(folder) / "cells" / f"{row['id']}.json", row)
            found[name] = row
            done.append((cell, row))
            tell("finished", row, index + 1)
    return [found[name] for name in names]


def read_cells(folder: str | Path) -> list[dict[str, Any]]:
    """All rows kept in a folder, of whatever code; see `row["environment"]["source"]`."""
    return [json.loads(path.read_text()) for path in sorted((Path(folder) / "cells").glob("*.json"))]


def _is_final(row: dict[str, Any], limits: dict[str, Any]) -> bool:
    """Whether measuring again would tell nothing new. A crash may pass; a tighter limit of then may be wider now."""
    if row["status"] in ("oom", "oom_predicted"):
        return _as_wide(row["limits"]["memory_limit_bytes"], limits["memory_limit_bytes"])
    if row["status"] == "timeout":
        return _as_wide(row["limits"]["timeout_s"], limits["timeout_s"])
    return row["status"] in ("ok", "unsupported")


def _lacks_trace(row: dict[str, Any]) -> bool:
    return row["status"] == "ok" and not row["trace"]


def _as_wide(then: float | None, now: float | None) -> bool:
    # A limit read off free memory wanders; a tenth more is no new chance.
    return then is None or (now is not None and now <= 1.1 * then)


def _older(cell: SpeedCell, rows: Any) -> dict[str, Any] | None:
    config = asdict(cell)
    return next((row for row in rows if row["config"] == config), None)


def _predicted(cell: SpeedCell, done: Any, limit_bytes: int | None) -> dict[str, Any] | None:
    excess = over_budget(cell, done, limit_bytes)
    if excess is not None:
        return {**blank_row(cell, "oom_predicted", excess.why), "predicted_bytes": excess.predicted_bytes}
    reason = too_slow(cell, done)
    return None if reason is None else blank_row(cell, "timeout", reason)
