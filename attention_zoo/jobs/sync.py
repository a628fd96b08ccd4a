"""Send to W&B what it lacks, from our own files: what the command `sync` does.

Every followed run has a receipt (tracking.receipts). Where that does not say that all has arrived, the run is told
again: figures of metrics.jsonl, result with its tables, model, measured cells, pages, pictures. Figures that W&B has
are left out where they are how the run begins. Of a run that was stopped and went on nobody knows which these are: all
are told, and what had arrived is there twice, at the same step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.files import Damaged, read_json, read_jsonl
from attention_zoo.inspect.command import attention_figures
from attention_zoo.jobs.status import folders_of
from attention_zoo.locks import Busy, owning
from attention_zoo.schemas import store
from attention_zoo.tracking import Guarded, RunInfo, Tracker, WandbTracker
from attention_zoo.tracking.receipts import Receipt, arrived, kept, receipt, receipts, supersede
from attention_zoo.tracking.tables import pictures
from attention_zoo.training.records import METRICS, MODEL, RESULT
from attention_zoo.training.saying import line_of

MOST_FAILED = 3
"""Runs one after the other that do not arrive: whatever keeps them is not theirs, and each takes its time."""
UNFINISHED = {"kind": "quality", "status": "unfinished", "error": "it has left no result", "seq_len": None}


@dataclass
class SyncConfig:
    """conf/sync.yaml.

    Fields:
        runs: a folder or a list of folders; every followed run, cell and report beneath is looked at.
        dry: say what would be sent, and send nothing.
        timeout: seconds that W&B may take to start, and again to end, for each run.
    """

    runs: Any = "runs"
    dry: bool = False
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 120.0


def register() -> None:
    """Make the schema known to Hydra, which conf/sync.yaml names first."""
    store("sync_schema", SyncConfig)


def sync(config: SyncConfig, say: Callable[[str], None] = print) -> str:
    """Send what W&B lacks; returns in one line what did not arrive, empty where all did.

    Args:
        config: see above.
        say: told a line for each run, and whatever goes wrong.

    Raises:
        ValueError: for folders that are not there.
    """
    found = [each for folder in folders_of(config.runs) for each in receipts(folder, say)]
    lacking = [(folder, each) for folder, each in found if not arrived(folder, each)]
    if not lacking:
        say(f"W&B has all of {_runs(len(found))}" if found else "no run was followed here")
        return ""
    failed, in_a_row = 0, 0
    for number, (folder, each) in enumerate(lacking, 1):
        name = f"[{number}/{len(lacking)}] {each.name or each.id}"
        if config.dry:
            say(f"{name}: would be sent, from {folder}")
            continue
        try:
            with owning(folder):
                why = _send(folder, each, config.timeout, say, more=number < len(lacking))
        except Busy as error:
            say(f"{name}: left alone, {error}")
            continue
        except OSError as error:
            why = line_of(error)
        say(f"{name}: {why or 'sent'}")
        failed, in_a_row = failed + bool(why), in_a_row + 1 if why else 0
        if in_a_row == MOST_FAILED and number < len(lacking):
            failed += len(lacking) - number
            say(f"{MOST_FAILED} in a row did not arrive: the others are left for another time")
            break
    return f"{failed} of {_runs(len(lacking))} did not arrive; the same command sends them" if failed else ""


def _runs(number: int) -> str:
    return f"{number} {'run' if number == 1 else 'runs'}"


def _send(folder: Path, known: Receipt, timeout_s: float, say: Callable[[str], None], *, more: bool) -> str:
    """Tell W&B a run as a whole; returns why that cannot be, or has not arrived."""
    try:
        told = list(_told(folder, known, say))
    except (Damaged, FileNotFoundError, ValueError) as error:
        return f"cannot be sent: {error}"
    how: dict[str, Any] = {"more": more, "whole": True, "rest": known.parts == 1}
    info = RunInfo(folder, known.name, known.id, known.backend, known.sweep, known.config, say, **how)
    # nobody waits for this as for a run: what the run's own options allow may have been too little
    options = {**known.options, "init_timeout": timeout_s, "finish_timeout": timeout_s}
    before = kept(folder, known)
    follower = Guarded(WandbTracker(info, mode="online", **options), say)
    try:
        failed = False
        for tell in told:
            failed = bool(tell(follower)) or failed
    except KeyboardInterrupt:
        follower.stop()
        raise
    follower.finish(failed=failed)
    now = receipt(folder, known.id)
    if now is None or now.state != "delivered":
        known.write(folder)
        for place in kept(folder, known) - before:  # what W&B has written by this try is nothing that we have not
            shutil.rmtree(place, ignore_errors=True)
        return "did not arrive"
    replace(known, state="delivered").write(folder)
    supersede(folder, known)
    return ""


def _told(folder: Path, known: Receipt, say: Callable[[str], None]) -> Iterator[Callable[[Tracker], Any]]:
    """What there is to tell of a run, each as a call of a tracker; one that returns True says that the run failed.

    Raises:
        ValueError: where that is gone, saying what.
        Damaged, FileNotFoundError: likewise.
    """
    cell = folder / "cells" / f"{known.of}.json"
    if known.backend == "report":
        rows = list(read_jsonl(folder / "results.jsonl", on_bad=say))
        for name, figure in pictures(rows).items():
            yield _call("figure", name, figure)
        if not (page := folder / "report.html").exists():
            raise FileNotFoundError(f"{page} is gone")
        yield _call("page", page)
    elif known.backend == "attention":
        for name, figure in attention_figures(read_json(folder / "attention.json")):
            yield _call("figure", name, figure)
    elif cell.exists():
        yield _result(read_json(cell))
    else:
        yield from _training(folder, known, say)


def _training(folder: Path, known: Receipt, say: Callable[[str], None]) -> Iterator[Callable[[Tracker], Any]]:
    row: dict[str, Any] = {**UNFINISHED, "seq_len": known.config.get("seq_len")}
    with suppress(FileNotFoundError):
        row = read_json(folder / RESULT)
        if row.get("id") not in (None, known.of):
            raise ValueError(f"{folder} holds another run by now")
    if row["status"] == "unfinished" and not (folder / METRICS).exists():
        raise ValueError(f"{folder} has neither figures nor a result")
    if (folder / METRICS).exists():
        for line in read_jsonl(folder / METRICS, on_bad=say):
            if isinstance(step := line.pop("step", None), int):
                yield _call("log", line, step)
    yield _result(row)
    if row["status"] == "ok" and (folder / MODEL).exists():
        yield _call("model", folder / MODEL)


def _call(what: str, *given: Any) -> Callable[[Tracker], Any]:
    return lambda tracker: getattr(tracker, what)(*given)


def _result(row: Mapping[str, Any]) -> Callable[[Tracker], bool]:
    def tell(tracker: Tracker) -> bool:
        tracker.result(row)
        return row["status"] != "ok"

    return tell
