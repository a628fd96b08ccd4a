"""Learning rate over a run, as a pure function of the step: nothing to save, nothing to restore.

A schedule takes the step, counted from 0, and returns the factor on the optimizer's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def warmup_cosine(*, steps: int, warmup: float = 0.05, floor: float = 0.1) -> Schedule:
    """Rise linearly over the first `warmup` share of the steps, then fall along half a cosine to `floor`.

    Args:
        steps: of the whole run.
        warmup: share of the steps over which the rate rises.
        floor: share of the highest rate at which it ends.

    Raises:
        ValueError: for a share outside [0, 1], naming it.
    """
    for name, value in (("warmup", warmup), ("floor", floor)):
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ValueError(f"schedule.{name} must be a share between 0 and 1, got {value!r}")
    rising = round(warmup * steps)
    falling = max(1, steps - 1 - rising)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / falling)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def constant(*, steps: int, warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first `warmup` share of the steps, then stay.

    Args:
        steps: of the whole run.
        warmup: share of the steps over which the rate rises.
    """
    return warmup_cosine(steps=steps, warmup=warmup, floor=1.0)
