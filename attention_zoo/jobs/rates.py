"""A grid of learning rates for each backend: one seed tries them all, validation chooses, the other seeds follow.

The run of the first seed at the chosen rate is a result like those of the other seeds: it is not trained twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attention_zoo.jobs.trainings import Run
from attention_zoo.results.row import Row

SET = "validation"


def tried(runs: Sequence[Run], rates: Sequence[float]) -> list[Run]:
    """For the first run of each backend one at each rate; all say which were tried."""
    return [_at(run, rate, rates, named=True) for run in _first(runs) for rate in rates]


def chosen(runs: Sequence[Run], rates: Sequence[float], rows: Mapping[str, Row]) -> dict[str, float]:
    """Backend -> the rate that is best on validation, the smaller of equal ones.

    Args:
        rows: of `tried`, by the runs' names. A run without a figure, which may have diverged, is none to choose; where
            no rate has one the smallest is taken, whose row says why.
    """
    found = {}
    for run in _first(runs):
        scores: dict[float, float] = {}
        for rate in rates:
            row = rows.get(_at(run, rate, rates, named=True).name, {})
            score = _score(row)
            if score is not None:
                scores[rate] = score if row.get("better") == "lower" else -score
        found[run.config["backend"]] = min(sorted(scores), key=scores.__getitem__) if scores else min(rates)
    return found


def with_rates(runs: Sequence[Run], rates: Sequence[float], best: Mapping[str, float]) -> list[Run]:
    """The runs at the chosen rates; the first of each backend is the one that tried it."""
    first = {run.name for run in _first(runs)}
    return [_at(run, best[run.config["backend"]], rates, named=run.name in first) for run in runs]


def _first(runs: Sequence[Run]) -> list[Run]:
    return list({run.config["backend"]: run for run in reversed(runs)}.values())[::-1]


def _at(run: Run, rate: float, rates: Sequence[float], *, named: bool) -> Run:
    config: dict[str, Any] = {
        **run.config,
        "optimizer": {**run.config["optimizer"], "lr": rate},
        "rates": list(rates),
    }
    return Run(f"{run.name}-lr{rate:g}" if named else run.name, config)


def _score(row: Row) -> float | None:
    """The main metric on validation; on the set that was looked at in training, where none is called so."""
    if row.get("status") != "ok":
        return None
    sets = row.get("evaluations") or {}
    scores: Row = sets.get(SET) or next(iter(sets.values()), {})
    value = scores.get(str(row.get("metric")))
    return float(value) if isinstance(value, int | float) else None
