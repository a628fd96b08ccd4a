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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_zoo.files import Damaged, plain, read_json, write_json
from attention_zoo.jobs.trainings import Run
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery

KEPT = "steps.json"
Chosen = dict[str, int | dict[str, int]]
"""By plan: the steps of all its backends, or by backend."""
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


@dataclass(frozen=True)
class Asked:
    """What a plan's steps are chosen by.

    Fields:
        seconds: that its trainings may take together.
        runs: all of them.
        own: whether each backend gets as many as its share of the seconds holds, instead of the same as all.
        against: the backend that the chosen number is of, where a regime has scaled the others' to it.
    """

    seconds: float
    runs: Sequence[Run]
    own: bool = False
    against: str = "full"

    def key(self, parallel: int) -> str:
        """What names the choice: another plan is timed anew."""
        said = [self.seconds, parallel, [run.config for run in self.runs], *([True] if self.own else [])]
        return hashlib.sha256(json.dumps(plain(said), sort_keys=True).encode()).hexdigest()[:16]

    def choose(self, timed: Mapping[str, float], parallel: int) -> int | dict[str, int]:
        """The steps, or those of each backend, from the seconds of a step of each."""
        configs = [run.config for run in self.runs if run.config["backend"] in timed]
        if self.own:
            share = self.seconds * parallel / len(configs)
            return {name: affordable([each], min(share, self.seconds), parallel=1) for name, each in timed.items()}
        base = next((config["steps"] for config in configs if config["backend"] == self.against), configs[0]["steps"])
        of_runs = [timed[config["backend"]] * config["steps"] / base for config in configs]
        return affordable(of_runs, self.seconds, parallel=parallel)


def known_steps(plans: Mapping[str, Asked], folder: Path, *, parallel: int) -> Chosen:
    """The steps of those plans for which they were chosen before."""
    known = _read(folder / KEPT)
    found = {name: _kept(known.get(name), asked.key(parallel)) for name, asked in plans.items()}
    return {name: steps for name, steps in found.items() if steps is not None}


def equal_steps(
    plans: Mapping[str, Asked],
    folder: Path,
    *,
    parallel: int,
    on_chosen: Callable[[str, int | Mapping[str, int], Mapping[str, float]], None] = lambda name, steps, timed: None,
) -> Chosen:
    """How many steps each plan's runs take; plans of which none can be trained are left out: each run says why.

    Args:
        plans: by name.
        folder: of the comparison; `KEPT` in it is read, and written.
        parallel: trainings at a time.
        on_chosen: told the median seconds of a step of each backend, where they were timed just now.
    """
    chosen = known_steps(plans, folder, parallel=parallel)
    for name, asked in plans.items():
        if name in chosen or not (timed := _timed([run.config for run in asked.runs], parallel)):
            continue
        chosen[name] = asked.choose(timed, parallel)
        known = _read(folder / KEPT)
        known[name] = {"asked": asked.key(parallel), "steps": chosen[name], "step_seconds": timed}
        write_json(folder / KEPT, known)
        on_chosen(name, chosen[name], timed)
    return chosen


def _kept(found: Any, key: str) -> int | dict[str, int] | None:
    """What was chosen for a plan of this key."""
    if not isinstance(found, dict) or found.get("asked") != key:
        return None
    steps = found.get("steps")
    each = list(steps.values()) if isinstance(steps, dict) else [steps]
    return steps if each and all(count in GRID for count in each) else None


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
