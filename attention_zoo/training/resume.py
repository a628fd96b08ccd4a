"""Where a run stands, kept in its checkpoint and taken up again to the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_zoo.files import plain
from attention_zoo.measure.ends import ran_out_of_memory
from attention_zoo.training.checkpoint import (
    CURE,
    CheckpointError,
    OtherRun,
    foreign,
    load_checkpoint,
    save_checkpoint,
)
from attention_zoo.training.fit import History
from attention_zoo.training.progress import Progress
from attention_zoo.training.seed import random_state, restore_random_state
from attention_zoo.training.trainer import Trainer


def save(paths: tuple[Path, Path], identity: str, data: Any, trainer: Trainer, history: History, lines: int) -> None:
    """Write the checkpoint.

    Args:
        paths: of the newest one, and of the one before it, which the newest so far becomes.
        identity: of the run.
        data: what the task says of its data.
        lines: written to the run's metrics so far.
    """
    content = {"identity": identity, "data": data, "trainer": trainer.state_dict()}
    content |= {"history": history.state_dict(), "random": random_state(), "lines": lines}
    newest, before = paths
    save_checkpoint(newest, content, before=before)


def resume(
    paths: Sequence[Path],
    identity: str,
    data: Any,
    trainer: Trainer,
    history: History,
    *,
    steps: int,
    progress: Progress,
) -> tuple[int | None, int | None]:
    """Go on from the newest checkpoint of this run that can be used; each that cannot is told.

    Args:
        paths: of checkpoints, from the newest on; those that are not there are passed over.
        steps: of the whole run.

    Returns:
        the step that it stands at, and how many lines had been logged then; None for a run that starts afresh.

    Raises:
        CheckpointError: for files that are damaged or none of this run's, where there is no other: that of the newest.
    """
    wrong: CheckpointError | None = None
    for path in (path for path in paths if path.exists()):
        try:
            content = load_checkpoint(path, identity)
            if json.dumps(plain(content.get("data"))) != json.dumps(data):
                raise OtherRun(f"{path} was trained on other data")
            lines = _load(content, path, trainer, history, steps)
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
            os.replace(path, paths[0])  # the next one that is written must not push the sound one out
        return trainer.done, lines
    if wrong is not None:
        raise wrong
    return None, None


def _load(content: dict[str, Any], path: Path, trainer: Trainer, history: History, steps: int) -> int:
    """Take up all that a checkpoint holds; returns its count of lines."""
    try:
        trainer.load_state_dict(content["trainer"], path)
        history.load_state_dict(content["history"])
        restore_random_state(content["random"])
        lines = int(content["lines"])
        if trainer.done > steps or not 0 <= trainer.done - history.settled <= 1 or lines < 0:
            raise ValueError(f"step {trainer.done} of {steps}, settled {history.settled}, {lines} lines")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise
        raise foreign(path, f"it does not fit this run ({type(error).__name__}: {error})") from None
    return lines
