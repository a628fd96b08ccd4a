"""Where a run stands, kept in its checkpoint and taken up again to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attention_zoo.files import plain
from attention_zoo.measure.ends import ran_out_of_memory
from attention_zoo.training.checkpoint import CheckpointError, OtherRun, foreign, load_checkpoint, save_checkpoint
from attention_zoo.training.fit import History
from attention_zoo.training.progress import Progress
from attention_zoo.training.seed import random_state, restore_random_state
from attention_zoo.training.trainer import Trainer


def save(path: Path, identity: str, data: Any, trainer: Trainer, history: History, lines: int) -> None:
    """Write the checkpoint.

    Args:
        identity: of the run.
        data: what the task says of its data.
        lines: written to the run's metrics so far.
    """
    content = {"identity": identity, "data": data, "trainer": trainer.state_dict()}
    content |= {"history": history.state_dict(), "random": random_state(), "lines": lines}
    save_checkpoint(path, content)


def resume(
    path: Path, identity: str, data: Any, trainer: Trainer, history: History, *, steps: int, progress: Progress
) -> tuple[int | None, int | None]:
    """Go on from the checkpoint, where there is one of this run.

    Args:
        steps: of the whole run.

    Returns:
        the step that it stands at, and how many lines had been logged then; None for a run that starts afresh.

    Raises:
        CheckpointError: for a file that is damaged or none of this run's.
    """
    if not path.exists():
        return None, None
    try:
        content = load_checkpoint(path, identity)
        if json.dumps(plain(content.get("data"))) != json.dumps(data):
            raise OtherRun(f"{path} was trained on other data")
    except OtherRun as other:
        progress.notice(f"{other}: starts afresh")
        return None, None
    lines = _load(content, path, trainer, history, steps)
    progress.notice(f"had ended: {history.stopped}" if history.stopped else f"goes on after step {trainer.done}")
    return trainer.done, lines


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
