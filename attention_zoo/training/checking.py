"""What a task must be, and what its batches must hold: other people's are refused in a sentence that is not torch's."""

from __future__ import annotations

from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attention_zoo.rules import shown
from attention_zoo.tasks.task import IGNORED, Batch, Task
from attention_zoo.training.objective import objective_of


def check_task(task: Any) -> None:
    """Raise a ValueError for what is no task, naming the attribute that is wrong or missing."""
    kind = type(task).__name__
    if not isinstance(task, Task):
        raise ValueError(f"task must be a Task (attention_zoo.tasks), got {kind}")
    for name, rule in (("name", str), ("vocab", int), ("metric", str), ("better", str)):
        if not isinstance(getattr(task, name, None), rule):
            raise ValueError(f"{kind}.{name} must be given, {rule.__name__}, got {shown(getattr(task, name, None))}")
    if task.better not in ("higher", "lower"):
        raise ValueError(f"{kind}.better must be higher or lower, got {task.better!r}")
    if objective_of(task).head in ("classify", "tokens") and not task.classes:
        raise ValueError(f"{kind}.classes must be given for objective {task.objective}, got {task.classes!r}")


def check_batch(task: Task, batch: Any) -> None:
    """Raise a ValueError for a batch that is none, or not one of such a task, naming the field and the rule."""
    kind = type(task).__name__
    if not isinstance(batch, Batch):
        raise ValueError(f"{kind}: batches must be a Batch, got {shown(batch)}")
    if not _is_long(batch.ids) or batch.ids.ndim != 2:
        raise ValueError(f"{kind}: ids must be int64 [batch, length], got {_of(batch.ids)}")
    rows, length = batch.ids.shape
    one = task.objective == "classify"
    shape = (rows,) if one else (rows, length)
    answers = (task.classes or 0) if objective_of(task).head in ("classify", "tokens") else task.vocab
    for name, given, expected, below in (
        ("targets", batch.targets, shape, answers),
        *((f"labels[{name}]", label, (rows,), task.classes or 0) for name, label in batch.labels.items()),
    ):
        if not _is_long(given) or tuple(given.shape) != expected:
            raise ValueError(f"{kind}: {name} must be int64 of shape {expected}, got {_of(given)}")
        asked = given[given != IGNORED]
        if len(asked) and not (int(asked.min()) >= 0 and int(asked.max()) < below):
            raise ValueError(
                f"{kind}: {name} must be from 0 to {below - 1}, or {IGNORED} where nothing is asked, "
                f"got {int(asked.min())} to {int(asked.max())}"
            )
    if batch.tokens is not None and bool(batch.tokens.is_global.any()) and not task.global_tokens:
        raise ValueError(f"{kind}.global_tokens must be true where some tokens are global, got {task.global_tokens!r}")
    for name, group in batch.groups.items():
        if not isinstance(group, Tensor) or tuple(group.shape) != shape:
            raise ValueError(f"{kind}: groups[{name}] must have the shape of targets, {shape}, got {_of(group)}")
    if (batch.source is not None) != (task.objective == "seq2seq"):
        raise ValueError(f"{kind}: source belongs to objective seq2seq and to no other, got objective {task.objective}")


def figure(task: Task, name: str, value: Any) -> float | None:
    """A figure that a task says of itself, as a plain number; a ValueError for what is none. None where it has none."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value)):
        raise ValueError(f"{type(task).__name__}.{name} must be a finite number, or None, got {shown(value)}")
    return None if value is None else float(value)


def _is_long(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype == torch.int64


def _of(given: Any) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else shown(given)
