"""What a run takes, before it is begun: seconds of a step and of an evaluation, memory, disk."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from attention_zoo.measure.environment import environment
from attention_zoo.measure.given import given_to
from attention_zoo.model.saved import save as save_model
from attention_zoo.tracking.naming import run_name
from attention_zoo.training.assembly import Assembly, assemble
from attention_zoo.training.building import build
from attention_zoo.training.config import check, device_of, options_of
from attention_zoo.training.elsewhere import elsewhere, placed
from attention_zoo.training.heap import keep_freed
from attention_zoo.training.models import mechanism_of
from attention_zoo.training.records import CHECKPOINT, MODEL
from attention_zoo.training.run import run_identity
from attention_zoo.training.seed import contained, seed_all
from attention_zoo.training.trainer import Trainer

FIRST = ("torch._dynamo", "attention_zoo.training.optimizer")
"""What making an optimizer imports: a second of each training's time, unless the process that forks it has it."""
WARMUP = 1
ENOUGH_S, MOST = 1.0, 100
"""So long short steps are timed where a run is timed wholly, and so many: one alone may have waited for other work."""
EVALUATION_S = 2.0
"""After which no further batch of an evaluation set is scored: the share of the rows that was tells the rest."""
PLACES = 5
"""Of a run whose rows grow, evenly apart, where steps are timed: `lessons` of a task begin with short ones."""
CHECKPOINTS = 2
"""That are on the disk at a time: one is there while the next is written."""


def timed_steps(config: Mapping[str, Any], steps: int, *, wholly: bool = False) -> dict[str, Any]:
    """Seconds of each of a run's first steps after `WARMUP`, or the mean over `PLACES`; nothing is written.

    Args:
        config: composed conf/train.yaml as plain values.
        steps: how many to time; wholly, at least.
        wholly: also score what the run will score, and look at what was used.

    Returns:
        {"seconds": [...]}, or {"error": why there are none}. Wholly: also "start_seconds" of building everything,
        "evaluation_seconds" of the main set, "scoring_seconds" of all others and of `evaluate_at`,
        "around_seconds" of what a run does once beside these, "peak_bytes" (of device memory, on the CPU resident),
        "disk_bytes" that the run will leave, and "all_seconds" of this call.
    """
    entered = time.perf_counter()
    with contained():
        try:
            began = time.perf_counter()
            config = check(config)
            options = options_of(config)
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            if device_of(options.device) == "cpu":
                keep_freed()
            seed_all(options.seed)
            task = build(options.task, "task")
            task.check(options.seq_len)
            parts = assemble(options, mechanism_of(options), task)
            trainer = parts.trainer
            started = time.perf_counter() - began
            enough = ENOUGH_S if wholly else 0.0
            if task.lessons:
                seconds = [fmean(_there(trainer, place, steps, enough / PLACES) for place in _places(options.steps))]
            else:
                seconds = _seconds(trainer, steps, enough)
            found: dict[str, Any] = {"seconds": seconds}
            if wholly:
                main, *others = [_scored(parts, name) for name in parts.sets]
                entries = placed(elsewhere(options, parts), options, parts)
                others += [_scored(there, name) for _, there, name in entries]
                found |= {"start_seconds": started, "evaluation_seconds": main, "scoring_seconds": sum(others)}
                found |= {"around_seconds": _around(config, parts)}
                found |= {"peak_bytes": _peak_bytes(trainer.device), "disk_bytes": _disk_bytes(parts)}
                found |= {"all_seconds": time.perf_counter() - entered}
            return found
        except (ValueError, ArithmeticError, NotImplementedError, RuntimeError) as error:  # the run will say so
            return {"error": " ".join(str(error).split())}


def _seconds(trainer: Trainer, steps: int, enough: float) -> list[float]:
    """Of each step behind `WARMUP`, of so many at least, and of so many seconds."""
    seconds: list[float] = []
    while len(seconds) < WARMUP + steps or (sum(seconds[WARMUP:]) < enough and len(seconds) < MOST):
        began = time.perf_counter()
        trainer.step()
        if trainer.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP:]


def _places(steps: int) -> list[int]:
    return [part * (steps - 1) // (PLACES - 1) for part in range(PLACES)]


def _there(trainer: Trainer, place: int, steps: int, enough: float) -> float:
    """Seconds of a step, from that one on."""
    trainer.batches.load_state_dict({"step": place})
    return fmean(_seconds(trainer, steps, enough))


def _scored(parts: Assembly, name: str) -> float:
    """Seconds of scoring one set, from as many of its batches as `EVALUATION_S` holds."""
    began, asked = time.perf_counter(), 0

    def enough() -> bool:
        nonlocal asked
        if asked and time.perf_counter() - began > EVALUATION_S:
            return True
        asked += 1
        return False

    whole = parts.score(name, enough) is not None
    seconds = time.perf_counter() - began
    return seconds if whole else seconds / asked * sum(1 for _ in parts.batches(name))


def _around(config: Mapping[str, Any], parts: Assembly) -> float:
    """Seconds of naming a run, saying where it runs and what it was given, and saving its model, all done once."""
    began = time.perf_counter()
    options, name = options_of(config), run_identity(config)
    environment()
    run_name(str(options.backend), identity=name, options=config["attention"] if not options.hybrid else {})
    with suppress(Exception):  # other people's mechanisms may not take such a call, and the run will say so
        given_to(parts.model, options.seq_len)
    with tempfile.TemporaryDirectory() as place:
        save_model(parts.finished(), Path(place) / MODEL)
        torch.save(parts.trainer.state_dict(), Path(place) / CHECKPOINT)
    return time.perf_counter() - began


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _disk_bytes(parts: Assembly) -> int:
    """Of the model and its checkpoints."""
    model = sum(each.numel() * each.element_size() for each in parts.model.state_dict().values())
    tensors = [each for each in tree_leaves(parts.trainer.state_dict()) if isinstance(each, torch.Tensor)]
    return model + CHECKPOINTS * sum(each.numel() * each.element_size() for each in tensors)
