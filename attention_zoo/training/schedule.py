"""Learning rate over a run, as a pure function of the step: nothing to save, nothing to restore.

A schedule takes the step, counted from 0, and returns the factor on the optimizer's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attention_zoo.options import Positive, Share, checked

Schedule = Callable[[int], float]


@checked(prefix="schedule.")
def warmup_cosine(*, steps: Positive, warmup: Share = 0.05, floor: Share = 0.1) -> Schedule:
    """Rise linearly over the first `warmup` share of the steps, then fall along half a cosine to `floor`.

    Args:
        steps: of the whole run.
        warmup: share of the steps over which the rate rises.
        floor: share of the highest rate at which it ends.

    Raises:
        ValueError: for a share outside [0, 1], naming it.
    """
    rising = round(warmup * steps)
    falling = max(1, steps - 1 - rising)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / falling)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


@checked(prefix="schedule.")
def constant(*, steps: Positive, warmup: Share = 0.0) -> Schedule:
    """Rise linearly over the first `warmup` share of the steps, then stay.

    Args:
        steps: of the whole run.
        warmup: share of the steps over which the rate rises.
    """
    return warmup_cosine(steps=steps, warmup=warmup, floor=1.0)
