"""Where a run stands, kept in its checkpoint and taken up again: to the same bits by as many processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from attention_zoo.measure.ends import ran_out_of_memory
from attention_zoo.parallel.world import Lost
from attention_zoo.training.checkpoint import (
    CURE,
    CheckpointError,
    OtherRun,
    foreign,
    load_checkpoint,
    save_checkpoint,
)
from attention_zoo.training.fit import History
from attention_zoo.training.folder import check_run, load_file, load_folder, save_folder
from attention_zoo.training.progress import Progress
from attention_zoo.training.seed import random_state, restore_random_state
from attention_zoo.training.trainer import Trainer


class Places(NamedTuple):
    """Where a run keeps its checkpoints.

    Fields:
        file, file_before: of one process; the newest and the one before it.
        folder, folder_before: of several.
    """

    file: Path
    file_before: Path
    folder: Path
    folder_before: Path


def save(places: Places, identity: str, data: Any, trainer: Trainer, history: History, lines: int) -> None:
    """Write the checkpoint; of several processes all together. One of the other kind goes: it is older.

    Args:
        identity: of the run.
        data: what the task says of its data.
        lines: written to the run's metrics so far.
    """
    if trainer.world.size > 1:
        save_folder((places.folder, places.folder_before), identity, data, trainer, history, lines)
        trainer.world.by_first(lambda: remove(places.file, places.file_before))
        return
    content = {"identity": identity, "data": data, "trainer": trainer.state_dict()}
    content |= {"history": history.state_dict(), "random": random_state(), "lines": lines}
    save_checkpoint(places.file, content, before=places.file_before)
    remove(places.folder, places.folder_before)


def remove(*paths: Path) -> None:
    """Files and folders, where they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def resume(
    places: Places, identity: str, data: Any, trainer: Trainer, history: History, *, steps: int, progress: Progress
) -> tuple[int | None, int | None]:
    """Go on from the newest checkpoint of this run that can be used; each that cannot is told.

    Args:
        steps: of the whole run.

    Returns:
        the step that it stands at, and how many lines had been logged then; None for a run that starts afresh.

    Raises:
        CheckpointError: for checkpoints that are damaged or none of this run's, where there is no other: that of the
            newest.
    """
    world = trainer.world
    wrong: CheckpointError | None = None
    for path in world.by_first(lambda: _newest_first(places)):
        notes: list[str] = []
        try:
            lines = _load(path, places, identity, data, trainer, history, steps, notes)
        except OtherRun as other:
            if wrong is not None:
                break
            progress.notice(f"{other}: starts afresh")
            return None, None
        except CheckpointError as error:
            wrong = wrong or error
            continue
        where = f"had ended: {history.stopped}" if history.stopped else f"goes on after step {trainer.done}"
        if wrong is None:
            progress.notice(where)
        else:
            progress.warn(f"{str(wrong).removesuffix(f'; {CURE}')}; {path.name}, the one before, is taken: {where}")
            world.by_first(lambda path=path: _put_first(path, places))  # type: ignore[misc]
        for note in notes:
            progress.warn(note)
        return trainer.done, lines
    if wrong is not None:
        raise wrong
    return None, None


def _newest_first(places: Places) -> list[Path]:
    """Those that are there; of both kinds where a process was killed between writing one and removing the other."""
    kinds = ((places.file, places.file_before), (places.folder, places.folder_before))
    there = [[path for path in kind if path.exists()] for kind in kinds]
    there.sort(key=lambda kind: max((path.stat().st_mtime_ns for path in kind), default=0), reverse=True)
    return [path for kind in there for path in kind]


def _put_first(path: Path, places: Places) -> None:
    """The next one that is written must not push the sound one out."""
    first = places.file if path in (places.file, places.file_before) else places.folder
    if path != first:
        if path.is_dir() and first.exists():
            remove(first)
        os.replace(path, first)


def _load(
    path: Path,
    places: Places,
    identity: str,
    data: Any,
    trainer: Trainer,
    history: History,
    steps: int,
    notes: list[str],
) -> int:
    """Take up all that a checkpoint holds; its count of lines. All processes do, or none."""
    found = 0
    wrong: Exception | None = None
    try:
        found = _reader(path, places, trainer.world.size)(path, identity, data, trainer, history, notes)
        if trainer.done > steps or not 0 <= trainer.done - history.settled <= 1 or found < 0:
            raise ValueError(f"step {trainer.done} of {steps}, settled {history.settled}, {found} lines")
    except Lost:
        raise
    except CheckpointError as error:
        wrong = error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OSError) as error:
        if ran_out_of_memory(error):
            raise
        wrong = foreign(path, f"it does not fit this run ({type(error).__name__}: {error})")
    everybody = trainer.world.everybody
    told = None if wrong is None else (isinstance(wrong, OtherRun), str(wrong))
    for each in everybody.gathered(told):
        if each is not None:
            raise (OtherRun if each[0] else CheckpointError)(each[1]) from wrong
    return found


def _reader(path: Path, places: Places, processes: int) -> Callable[..., int]:
    if path in (places.folder, places.folder_before):
        return load_folder
    return load_file if processes > 1 else _load_alone


def _load_alone(path: Path, identity: str, data: Any, trainer: Trainer, history: History, _notes: list[str]) -> int:
    content = load_checkpoint(path, identity)
    check_run(path, content["identity"], content.get("data"), identity, data)
    trainer.load_state_dict(content["trainer"], path)
    history.load_state_dict(content["history"])
    restore_random_state(content["random"])
    return int(content["lines"])
