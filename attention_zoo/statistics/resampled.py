"""How wide the figure of one training is for the few rows that it was evaluated on: a bootstrap over those rows.

It says what other rows of the same kind would have given, and nothing of other seeds: mechanisms are compared over
seeds (`paired`), never by these intervals. Efron 1979; percentiles, through `scipy.stats.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 999
_AT_ONCE = 2**20
"""Numbers drawn at a time."""

Array = NDArray[np.float64]


def interval_over_rows(
    rows: Array, score: Callable[[float, float], float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """The interval of a score of mean loss and mean accuracy, had other rows been drawn.

    Args:
        rows: [n, 3], for each row the sum of its losses, its right answers, its scored answers. Answers of one row
            depend on one another, so rows are drawn whole.
        score: (mean loss, mean accuracy) over all answers -> the figure.

    Returns:
        its ends; None below two rows with answers.
    """
    given = np.asarray(rows, float)
    given = given[given[:, 2] > 0]
    if len(given) < 2:
        return None
    from scipy import stats  # takes a second to import

    score_all = np.vectorize(score, otypes=[float])

    def figure(loss: Array, hits: Array, count: Array, axis: int) -> Array:
        answers = count.sum(axis)
        return np.asarray(score_all(loss.sum(axis) / answers, hits.sum(axis) / answers))

    found = stats.bootstrap(
        tuple(given.T), figure, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES,
        batch=max(1, _AT_ONCE // len(given)), confidence_level=confidence, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
