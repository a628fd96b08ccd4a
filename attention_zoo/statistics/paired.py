"""One comparison: paired t tests of a difference from zero, and of its being within a margin (TOST).

Student 1908; two one-sided tests: Schuirmann 1987. Differences that are all the same have no spread, so no t: they are
taken at their word from `ALIKE` seeds on, as many as a test of their signs needs (2 · 2⁻ⁿ ≤ 5 %), and before that
nothing is said.

Equal mechanisms have scores of one distribution, so their differences are symmetric, and t keeps its level however
skewed or bimodal the scores are. It does not where a difference of mean 0 is skewed itself: of centred exponential
ones, seven seeds call 11 % different alone and 21 % of families of four, which no test of so few seeds can help.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALIKE = 6
"""Seeds from which on differences without any spread are believed."""
_SAME = 1e-9
"""Spread, as a share of the mean, that is the rounding of a subtraction and no spread."""
_NOTHING = 1e-12
"""A difference that is such a rounding itself."""

Array = NDArray[np.float64]
Scores = Iterable[tuple[Hashable, float]]
"""Seed and figure of runs."""


def alike(differences: ArrayLike) -> NDArray[np.bool_]:
    """[...], whether all `n` differences [..., n] are the same."""
    given = np.asarray(differences, float)
    spread = np.ptp(given, axis=-1)
    return spread <= np.maximum(_SAME * np.abs(given.mean(-1)), _NOTHING)


def p_different(differences: ArrayLike) -> Array:
    """[...], the two-sided p of `n` paired differences [..., n], finite: how likely so large a mean is without one.

    1 where they cannot show anything: below two pairs, or below `ALIKE` without any spread.
    """
    given = np.asarray(differences, float)
    mean, same = given.mean(-1), alike(given)
    told = np.where((np.abs(mean) > _NOTHING) & (given.shape[-1] >= ALIKE), 0.0, 1.0)
    return np.where(same, told, _t_test(given, same, 0.0, "two-sided"))


def p_equivalent(differences: ArrayLike, margin: float) -> Array:
    """[...], the p of TOST: how likely means so near zero are where the difference is `margin` or more, either way."""
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be a positive number, got {margin}")
    given = np.asarray(differences, float)
    mean, same = given.mean(-1), alike(given)
    told = np.where((np.abs(mean) < margin) & (given.shape[-1] >= ALIKE), 0.0, 1.0)
    above, below = _t_test(given, same, -margin, "greater"), _t_test(given, same, margin, "less")
    return np.where(same, told, np.maximum(above, below))


def _t_test(given: Array, same: NDArray[np.bool_], mean: float, alternative: str) -> Array:
    if given.shape[-1] < 2:
        return np.ones(given.shape[:-1])
    from scipy import stats  # takes a second to import

    with_spread = np.where(same[..., None], np.arange(given.shape[-1]), given)  # scipy warns of those without
    return np.asarray(stats.ttest_1samp(with_spread, mean, axis=-1, alternative=alternative).pvalue)


@dataclass(frozen=True)
class Pairs:
    """What one mechanism reached less what full attention did, for each seed that both were trained with.

    Fields:
        differences: of the seeds that both have, finite ones alone.
        unpaired: seeds that only one of both has, or that both have in no place together.
        broken: seeds at which one of both is NaN or infinite.
    """

    differences: tuple[float, ...]
    unpaired: int = 0
    broken: int = 0

    @staticmethod
    def of(own: Scores, reference: Scores) -> Pairs:
        """From (seed, value) of both; several values of a seed count as their mean."""
        return Pairs.over([(own, reference)])

    @staticmethod
    def over(places: Iterable[tuple[Scores, Scores]]) -> Pairs:
        """The same of several places, such as machines. Both runs of a pair are of one place, which changes both alike;
        a seed that has pairs in several counts once, with the mean of its differences, for they are no new draws."""
        both: list[tuple[Hashable, float]] = []
        seeds: set[Hashable] = set()
        for own, reference in places:
            mine, theirs = _by_seed(own), _by_seed(reference)
            seeds |= mine.keys() | theirs.keys()
            both += [(seed, mine[seed] - theirs[seed]) for seed in mine if seed in theirs]
        found = _by_seed(both)
        finite = tuple(each for each in found.values() if math.isfinite(each))
        return Pairs(finite, len(seeds) - len(found), len(found) - len(finite))

    def __len__(self) -> int:
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.differences)) if self.differences else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; exactly 0 where they are all the same, None below two."""
        if len(self) < 2:
            return None
        return 0.0 if alike(self.differences) else float(np.std(self.differences, ddof=1))

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Of the mean difference, from t, for this comparison alone; None where the seeds tell no spread."""
        if self.mean is None or not self.spread:
            return None
        from scipy import stats

        half = float(stats.t.ppf((1 + confidence) / 2, len(self) - 1)) * self.spread / math.sqrt(len(self))
        return self.mean - half, self.mean + half


def _by_seed(values: Scores) -> dict[Hashable, float]:
    found: dict[Hashable, list[float]] = {}
    for seed, value in values:
        found.setdefault(seed, []).append(float(value))
    return {seed: sum(many) / len(many) for seed, many in found.items()}
