"""Cells and reports in a dashboard: one run for each measured cell, and one for the report that was drawn of them all.

They are sent when nothing is being measured any more, one after the other and through one process, since a tracker
takes time that cells would be measured to take. What was sent is known by its receipt, so that a call that goes on
sends what an earlier one did not come to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from attention_zoo.results.row import Row
from attention_zoo.tracking import Guarded, NoTracker, RunInfo, Tracker
from attention_zoo.tracking.naming import run_name
from attention_zoo.tracking.receipts import receipt
from attention_zoo.tracking.tables import pictures
from attention_zoo.training.building import build
from attention_zoo.training.config import check_tracker
from attention_zoo.training.run import info_of


def followed(tracker: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """The config of a tracker that groups by this folder; None where nothing would be followed.

    Raises:
        ValueError: for a tracker that cannot be, naming what is wrong.
    """
    if not tracker:
        return None
    check_tracker(tracker)
    if resolve_name(tracker["_target_"]) is NoTracker:
        return None
    return {**tracker, "group": tracker["group"] or sweep_of(folder)} if "group" in tracker else dict(tracker)


def sweep_of(folder: Path) -> str:
    """What the runs of a folder are called together: compare/default."""
    return "/".join(Path(folder).absolute().parts[-2:])


def send_cells(rows: Iterable[Row], folder: Path, tracker: Mapping[str, Any], *, say: Callable[[str], None]) -> int:
    """Send the rows of cells that were not sent yet; returns how many.

    Args:
        rows: of any kind; those of kind "speed" are cells.
        folder: of the measurement.
        tracker: config of the tracker.
        say: told in one line about whatever goes wrong.
    """
    known = {str(row["id"]): row for row in rows if row["kind"] == "speed" and row["id"]}
    left = [row for name, row in known.items() if not _sent(folder, name)]
    for number, row in enumerate(left):
        options = {**row["config"].get("options", {}), "name": row["backend"]}
        kernel = None if row["kernel"] == "auto" else row["kernel"]
        words = kernel, row["variant"], row["phase"], row["length"], row["dtype"]
        info = RunInfo(
            folder=folder,
            name=run_name(row["backend"], *words, identity=row["id"], options=options),
            identity=row["id"],
            backend=row["backend"],
            sweep=sweep_of(folder),
            config={"attention": options, **{key: value for key, value in row["config"].items() if key != "options"}},
            notice=say,
            facts={"task": row["phase"], "seq_len": row["length"], "seed": None},
            more=number + 1 < len(left),
            whole=True,
            rest=True,
        )
        follower = _follower(tracker, info)
        follower.result(row)
        follower.finish(failed=row["status"] != "ok")
    return len(left)


def _sent(folder: Path, identity: str) -> bool:
    found = receipt(folder, identity)
    return found is not None and found.state != "begun"


def send_report(
    rows: Sequence[Row],
    path: Path,
    tracker: Mapping[str, Any],
    *,
    title: str,
    say: Callable[[str], None],
) -> None:
    """Send a report and the pictures of what each mechanism sees; the same rows give the same run.

    Args:
        rows: that it was drawn from.
        path: of the page.
        title: of the page.
        tracker, say: as of `send_cells`.
    """
    sweep = sweep_of(path.parent)
    known = sorted(str(row.get("id")) for row in rows)
    identity = hashlib.sha256(json.dumps([title, known]).encode()).hexdigest()[:16]
    info = RunInfo(
        folder=path.parent,
        name=run_name("report", sweep, identity=identity),
        identity=identity,
        backend="report",
        sweep=sweep,
        config={"title": title, "rows": len(rows)},
        notice=say,
        facts={"task": "report"},
        whole=True,
        rest=True,
    )
    follower = _follower(tracker, info)
    for name, figure in pictures(list(rows)).items():
        follower.figure(name, figure)
    follower.page(path)
    follower.finish(failed=False)


def send_end(row: Row, folder: str | Path, *, say: Callable[[str], None]) -> None:
    """Tell the tracker of a training whose process has ended without a word how it ended; it is the same run there.

    What W&B has of a run whose whole group of processes was killed would else be running for good.

    Args:
        row: of the run, with its config.
        folder: of the run.
        say: told in one line about whatever goes wrong.
    """
    tracker = row["config"].get("tracker")
    if not tracker or resolve_name(tracker["_target_"]) is NoTracker:
        return
    follower = _follower(tracker, info_of(row["config"], folder, row, say))
    follower.result(row)
    follower.finish(failed=True)


def _follower(tracker: Mapping[str, Any], info: RunInfo) -> Tracker:
    return Guarded(build(tracker, "tracker", info=info), info.notice)
