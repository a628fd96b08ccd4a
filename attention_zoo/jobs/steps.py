"""Equal steps for every backend, as many as a time allows: chosen before anything is trained.

A limit in seconds would give the slower mechanisms fewer steps, and a number of steps fits one machine. So a few steps
of each backend are timed, as many at a time as will be trained, and all get the largest number of a coarse grid at
which the whole plan stays within its seconds. The number is kept in the output folder: a job that goes on reads it
there, and the same folder never holds runs of two lengths.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, plain, read_json, write_json
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery

KEPT = "steps.json"
TIMED = 3
"""Steps of each backend that are timed."""
PATIENCE_S = 120.0
GRID = tuple(int(mantissa * 10**power) for power in range(1, 7) for mantissa in (1, 1.5, 2, 3, 5, 7.5))


def affordable(step_seconds: Sequence[float], seconds: float, *, parallel: int) -> int:
    """The largest number of `GRID` at which runs of so many steps each end within `seconds`; at least the smallest.

    Args:
        step_seconds: of each run.
        parallel: runs at a time.
    """
    total = max(sum(step_seconds) / parallel, *step_seconds)
    return max((steps for steps in GRID if steps * total <= seconds), default=GRID[0])


def equal_steps(
    plans: Mapping[str, tuple[float, Sequence[Mapping[str, Any]]]],
    folder: Path,
    *,
    parallel: int,
    on_chosen: Callable[[str, int, Mapping[str, float]], None] = lambda name, steps, timed: None,
) -> dict[str, int]:
    """How many steps each plan's runs take.

    Args:
        plans: name -> (seconds that its trainings may take together, the config of each).
        folder: of the comparison; `KEPT` in it is read, and written.
        parallel: trainings at a time.
        on_chosen: told the median seconds of a step of each backend, where they were timed just now.
    """
    path, chosen = folder / KEPT, {}
    known = _read(path)
    for name, (seconds, configs) in plans.items():
        asked = hashlib.sha256(json.dumps(plain([seconds, parallel, configs]), sort_keys=True).encode()).hexdigest()[
            :16
        ]
        kept = known.get(name)
        if not (isinstance(kept, dict) and kept.get("asked") == asked and kept.get("steps") in GRID):
            timed = _timed(configs, parallel)
            if not timed:
                continue  # none can be trained, and each run says why
            of_runs = [timed[config["backend"]] for config in configs if config["backend"] in timed]
            kept = {"asked": asked, "steps": affordable(of_runs, seconds, parallel=parallel), "step_seconds": timed}
            known[name] = kept
            write_json(path, known)
            on_chosen(name, kept["steps"], timed)
        chosen[name] = kept["steps"]
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (FileNotFoundError, Damaged):
        return {}
    return found if isinstance(found, dict) else {}


def _timed(configs: Sequence[Mapping[str, Any]], parallel: int) -> dict[str, float]:
    """Median seconds of a step by backend, for those that can be trained."""
    first = {config["backend"]: config for config in reversed(configs)}
    with ThreadPoolExecutor(min(parallel, len(first) or 1)) as pool:
        found = dict(zip(first, pool.map(_one, first.values())))
    return {name: statistics.median(seconds) for name, seconds in found.items() if seconds}


def _one(config: Mapping[str, Any]) -> list[float]:
    with Nursery() as nursery:
        given = {"config": dict(config), "steps": TIMED}
        found = nursery.call("attention_zoo.training.timing:timed_steps", given, timeout_s=PATIENCE_S)
    return [] if isinstance(found, Ended) else list(found.get("seconds", []))
