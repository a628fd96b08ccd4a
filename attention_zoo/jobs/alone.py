"""One training in a process of its own, and what became of it, whatever that is.

A nursery that has imported everything forks the process, so that a sweep pays for the imports once. It ends with
whoever started it, and when it is asked to stop it saves where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attention_zoo import stopping
from attention_zoo.files import plain
from attention_zoo.jobs.following import send_end
from attention_zoo.jobs.trainings import FIRST, GRACE_S, LEAVE_S, data_of, identity_of, prepare, share, task_name
from attention_zoo.locks import Busy, owning
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.kept import keep_row
from attention_zoo.measure.nursery import Nursery
from attention_zoo.results.row import Row
from attention_zoo.training.records import RESULT, lost_row
from attention_zoo.training.run import run_training
from attention_zoo.words import say

__all__ = ["FIRST", "prepare", "ready", "share", "train", "train_alone"]


def train_alone(
    nursery: Nursery, config: Mapping[str, Any], folder: str | Path, *, threads: int, look: Callable[[], None]
) -> Row:
    """Train in a fresh process.

    Args:
        config: composed conf/train.yaml as plain values.
        folder: of this run alone.
        threads: of torch, where the config leaves them to the machine.
        look: called a few times a second; what it raises asks the run to stop, and is raised again when it has.

    Returns:
        the row of the run: its own, or one that says how its process ended. Only one that ended by itself is kept as
        its result; a run that was stopped goes on from its checkpoint.
    """
    given = {"config": plain(config), "folder": str(folder), "threads": threads}
    budget = config["trainer"].get("max_seconds")
    limit = float("inf") if budget is None else 3 * budget + GRACE_S
    found = nursery.call("attention_zoo.jobs.alone:train", given, timeout_s=limit, look=look, leave_s=LEAVE_S)
    if isinstance(found, Ended):
        row = _unfinished(config, folder, found)
        send_end(row, folder, say=say)
        return row
    return found["row"] or _unfinished(config, folder, Ended("lost", f"{found['stopped']}; the next call goes on"))


def train(config: dict[str, Any], folder: str, threads: int) -> dict[str, Any]:
    """What the process does: {"row": ...}, or {"row": None, "stopped": by what}."""
    stopping.install()
    torch.set_num_threads(threads)
    try:
        # somebody may have begun it by another command since it was claimed
        return {"row": run_training(config, folder, wait_s=float("inf"))}
    except stopping.Stopped as stop:
        return {"row": None, "stopped": str(stop)}


def ready() -> dict[str, Any]:
    """Nothing: what that takes is what it takes to start."""
    return {}


def _unfinished(config: Mapping[str, Any], folder: str | Path, ended: Ended) -> Row:
    """The row of a run that gave none. One that was lost is no result: what it has saved says that it was begun."""
    row = plain(lost_row(config, identity_of(config), ended, task=task_name(config), data=data_of(config)))
    if ended.status != "lost":
        with suppress(Busy), owning(folder):  # who writes there by now knows better
            keep_row(Path(folder) / RESULT, row)
    return row
