"""What a number of seeds can show: the power of a paired t test, and the number that a gap needs.

Gaps are counted in standard deviations of the paired differences. Power is that of the noncentral t, as an average of
the normal distribution over the spreads that the seeds may find: `scipy.stats.nct` (1.17) gives NaN in its tails, at 11
seeds and 2 standard deviations already.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

ALPHA = 0.05
"""Probability of any false verdict among all comparisons of one task at one length."""
POWER = 0.8
GAP = 2.0
"""What presets are to show, in standard deviations of the paired differences."""
SEEDS = 7
"""What presets run at least: enough for `GAP` between full attention and each of four mechanisms."""
MOST = 1000
"""Seeds beyond which nobody is told a number."""
_PARTS = 1000


def power_of(seeds: int, gap_in_sd: float, level: float) -> float:
    """The probability that a two-sided paired t test at this level finds a gap, with its right sign or not."""
    if seeds < 2:
        return 0.0
    from scipy import special  # not stats, which takes a second to import

    critical = float(special.stdtrit(seeds - 1, 1 - level / 2))
    bound, shift = critical * _spreads(seeds - 1), abs(gap_in_sd) * math.sqrt(seeds)
    return float((special.ndtr(shift - bound) + special.ndtr(-bound - shift)).mean())


@lru_cache(maxsize=4096)
def _spreads(freedom: int) -> np.ndarray:
    """Equally likely values of the standard deviation that is found, where it is 1."""
    from scipy import special

    return np.sqrt(special.chdtri(freedom, (np.arange(_PARTS) + 0.5) / _PARTS) / freedom)


@lru_cache(maxsize=4096)
def detectable(seeds: int, level: float, power: float = POWER) -> float | None:
    """The smallest gap, in standard deviations, that so many seeds show with this power; None for a single one."""
    if seeds < 2:
        return None
    low, high = 0.0, 1.0
    while power_of(seeds, high, level) < power:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(seeds, middle, level) < power else (low, middle)
    return high


def seeds_for(gap_in_sd: float, level: float, power: float = POWER) -> int | None:
    """The fewest seeds that show a gap at this level; None above `MOST`."""
    if gap_in_sd <= 0 or power_of(MOST, gap_in_sd, level) < power:
        return None
    low, high = 1, MOST  # power grows with seeds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(middle, gap_in_sd, level) < power else (low, middle)
    return high


def seeds_needed(comparisons: int, gap_in_sd: float = GAP, power: float = POWER, alpha: float = ALPHA) -> int:
    """Seeds with which each of several comparisons shows a gap of its own, already at Holm's first step.

    Args:
        comparisons: mechanisms beside full attention on one task at one length.
        gap_in_sd: in standard deviations of the paired differences.
        power: of each comparison.
        alpha: of all together.

    Raises:
        ValueError: for arguments that no test can have, or a gap that needs more than `MOST` seeds.
    """
    if type(comparisons) is not int or comparisons < 1:
        raise ValueError(f"comparisons must be an integer of at least 1, got {comparisons}")
    if not (math.isfinite(gap_in_sd) and gap_in_sd > 0):
        raise ValueError(f"gap_in_sd must be a positive number, got {gap_in_sd}")
    for name, value in (("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    found = seeds_for(gap_in_sd, alpha / comparisons, power)
    if found is None:
        raise ValueError(f"gap_in_sd must be one that {MOST:,} seeds can show, got {gap_in_sd}")
    return found


def preset_seeds(comparisons: int) -> int:
    """Seeds that a preset runs: seven for up to four comparisons, where fewer would do for the fewest, more beyond."""
    return max(SEEDS, seeds_needed(comparisons))
