"""Which trainings cannot be, found before anything is timed, in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attention_zoo.jobs.trainings import Run
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery
from attention_zoo.training.records import RESULT

PATIENCE_S = 120.0


def refused(runs: Sequence[Run], folder: Path) -> dict[str, str]:
    """Why a run cannot be trained, by the run's name; its row will say the same. Runs without a reason are left out.

    Args:
        folder: of all runs, as `run_trainings` takes it; a run that has left a result there is not asked.
    """
    given = {"configs": {run.name: run.config for run in runs if not (run.within(folder) / RESULT).exists()}}
    if not given["configs"]:
        return {}
    with Nursery() as nursery:
        found = nursery.call("attention_zoo.training.possible:impossible", given, timeout_s=PATIENCE_S)
    return {} if isinstance(found, Ended) else found  # a mechanism that ends its process does so in its own run, too
