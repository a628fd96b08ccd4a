"""The longest length that trains within a memory budget: fitted from short lengths, then tried on both sides.

What counts is everything that the cell itself needs: parameters, inputs, and what the call holds at its worst moment.
The fit is a straight line in length, or in its square where costs grow faster. Then two real
runs are made in processes that are limited to the budget, one a little below the answer and one a little above: the
first must get through, the second must fail for want of memory. Where they disagree with the fit they move the answer.

On a CPU the limit is on the data segment, in which libraries' work space and what malloc cannot hand back count, too:
so the verified length may lie some per cent below the fitted one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

from attention_zoo import registry
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.derived import growth_exponent
from attention_zoo.measure.environment import device_name, environment
from attention_zoo.measure.identity import identity
from attention_zoo.measure.predict import EXPONENT
from attention_zoo.results.row import BudgetRow, Row, Status, Tried

MARGIN = 0.03
"""How far below and above the answer the two runs are."""
ATTEMPTS = 10
UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
MULTIPLE = 64
"""Lengths are rounded to these, the smaller blocks of every pattern."""


def parse_bytes(text: str) -> int:
    """ "8GiB", "512 MiB", "1.5GB" or plain bytes.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in UNITS:
        raise ValueError(f"budget must be a size such as 8GiB or 512MiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


@dataclass(frozen=True)
class Fit:
    """bytes = fixed + per_unit · length^power, with power 1 or 2."""

    fixed: float
    per_unit: float
    power: int

    def bytes(self, length: int) -> float:
        return self.fixed + self.per_unit * length**self.power

    def longest(self, budget_bytes: float) -> int:
        room = max(0.0, budget_bytes - self.fixed) / self.per_unit
        return int(room ** (1 / self.power))


def fit(points: Mapping[int, float]) -> Fit | None:
    """Through the two longest of the measured lengths; None below two, or where nothing grows.

    Two, since fixed costs and first steps hide the law at short lengths; tensor bytes have no noise to average out.
    """
    usable = sorted(points.items())[-2:]
    exponent = growth_exponent(points)
    if len(usable) < 2 or exponent is None:
        return None
    power = 2 if exponent > 1.5 else 1
    (short, less), (long, more) = usable
    if more <= less:
        return None
    per_unit = (more - less) / (long**power - short**power)
    return Fit(max(0.0, more - per_unit * long**power), per_unit, power)


def longest_trainable(
    cell: SpeedCell,
    rows: Sequence[Row],
    budget_bytes: int,
    attempt: Callable[[SpeedCell], Row],
    *,
    timeout_s: float = 120.0,
    say: Callable[[str], None] = lambda line: None,
) -> BudgetRow:
    """The row of kind "budget" of one series of cells.

    Args:
        cell: any of the series.
        rows: of its measured lengths.
        budget_bytes: what the cell may take.
        attempt: runs a cell in a process limited to the budget and returns its row.
        timeout_s: of one attempt; an answer whose runs would take longer is not tried, and says so.
    """
    measured = {row["length"]: row for row in rows if row["status"] == "ok" and row["peak_bytes"] is not None}
    points = {length: float(row["peak_bytes"] + row["held_bytes"]) for length, row in measured.items()}
    law = fit(points)
    if law is None:
        why = next((row["error"] for row in rows if row["error"]), "two measured lengths are needed, and growth")
        return _row(cell, budget_bytes, points, None, status="failed", error=f"nothing to fit: {why}")
    answer = law.longest(budget_bytes)
    if answer < 2 * MULTIPLE:
        return _row(cell, budget_bytes, points, law, status="failed", error=f"the budget ends at {answer} tokens")
    seconds = _seconds(cell, measured, answer)
    if seconds > timeout_s:
        why = f"not tried: a run would take about {seconds:,.0f} s, over timeout_s={timeout_s:g}"
        return _row(cell, budget_bytes, points, law, length=answer, why=why)
    fits: Row | None = None
    fails: Row | None = None
    length, step = _rounded(answer * (1 - MARGIN)), 2 * MARGIN
    for _ in range(ATTEMPTS):
        row = attempt(replace(cell, length=length))
        say(f"{cell.backend} {length:,}: {row['status']}")
        if row["status"] == "ok":
            fits = row
        elif row["status"] == "oom":
            fails = row
        else:
            why = f"{length:,} tokens: {row['status']}: {row['error']}"
            return _row(cell, budget_bytes, points, law, length=answer, fits=fits, fails=fails, why=why)
        if fits is None:
            length, step = _rounded(length * max(0.5, 1 - step)), 2 * step
        elif fails is None:
            length, step = _rounded(length * (1 + step), up=True), 2 * step
        else:
            apart = fails["length"] / fits["length"]
            length = _rounded((fits["length"] * fails["length"]) ** 0.5)
            if apart <= 1 + 3 * MARGIN or length in (fits["length"], fails["length"]):
                found = fits["length"]
                return _row(cell, budget_bytes, points, law, length=found, fits=fits, fails=fails, verified=True)
    why = f"no length that fits and none that does not, {ATTEMPTS} runs around {answer:,}"
    return _row(cell, budget_bytes, points, law, length=answer, fits=fits, fails=fails, why=why)


def _seconds(cell: SpeedCell, measured: Mapping[int, Row], length: int) -> float:
    """Of the calls of an attempt, by the growth that the backend declares: that of few and short calls is noise."""
    longest = max(measured)
    growth = EXPONENT[registry.recipe(cell.backend)[0].declared.compute]
    seconds: float = 2 * measured[longest]["seconds"] * (length / longest) ** max(1.0, growth)
    return seconds


def _rounded(length: float, up: bool = False) -> int:
    return max(1, (int(length) + (MULTIPLE - 1 if up else 0)) // MULTIPLE) * MULTIPLE


def _row(
    cell: SpeedCell, budget_bytes: int, points: Mapping[int, float], law: Fit | None, *, status: Status = "ok",
    error: str | None = None, length: int | None = None, fits: Row | None = None, fails: Row | None = None,
    verified: bool = False, why: str | None = None,
) -> BudgetRow:  # fmt: skip
    config = {**asdict(replace(cell, length=1)), "budget_bytes": budget_bytes}
    return {
        "kind": "budget",
        "id": identity(config, device=device_name(cell.device), threads=cell.threads),
        "status": status,
        "error": error,
        "backend": cell.backend,
        **cell.call(),
        "budget_bytes": budget_bytes,
        "length": length,
        "verified": verified,
        "not_verified": None if verified else why,
        "fits": _tried(fits),
        "fails": _tried(fails),
        "points": [[each, value] for each, value in sorted(points.items())],
        "bytes_per_token": law.per_unit if law and law.power == 1 else None,
        "fit": asdict(law) if law else None,
        "config": config,
        "environment": environment(cell.threads),
    }


def _tried(row: Row | None) -> Tried | None:
    return None if row is None else cast(Tried, {key: row[key] for key in Tried.__annotations__})
