"""Metrics, evaluation sets and numbers of seeds in words."""

from __future__ import annotations

from attention_zoo.report import units
from attention_zoo.statistics import Verdict, preset_seeds

PRIMARY = {
    "bits_per_byte": True, "bits_per_masked_byte": True, "exact_match": False, "accuracy": False, "loss": True
}  # fmt: skip
"""Metrics that a task may be judged by where its rows do not say, the preferred first, and whether lower is better."""
METRIC_WORDS = {
    "bits_per_byte": "bits per byte", "bits_per_masked_byte": "bits per masked byte", "exact_match": "exact match",
    "accuracy": "accuracy", "loss": "loss (nats)",
}  # fmt: skip
SHARES = ("accuracy", "exact_match")
"""Metrics that are shares of right answers."""
RESULT = "test"
"""The evaluation set that a run's result is of, where it has one; else the first."""
BITS, SHARE = 0.01, 0.01
"""Differences below which a mechanism is as good as full attention: bits per byte, and a point of accuracy."""
SETS = {"validation": "the validation set", "held_out": "the held-out set", "test": "the test set"}
"""What the evaluation sets of the shipped tasks are; any other stands under its own name."""


def spoken(name: str) -> str:
    """The name of an evaluation set in words."""
    return name.replace("_", " ")


def metric_words(metric: str) -> str:
    return METRIC_WORDS.get(metric, spoken(metric))


def seeds_words(comparisons: int) -> str:
    """How many seeds it takes."""
    needed = preset_seeds(comparisons)
    return f"{needed} are needed" + (f" for {comparisons} comparisons" if comparisons > 1 else "")


def value_words(value: float | None, metric: str) -> str:
    return units.percent(value) if metric.endswith(SHARES) else units.fixed(value, 3)


def margin(metric: str) -> float | None:
    """Within which a mechanism is as good; None for metrics of which nobody has said what is little."""
    return BITS if metric.startswith("bits_") else SHARE if metric.endswith(SHARES) else None


def margin_words(metric: str) -> str:
    return f"{BITS:g} {metric_words(metric)}" if metric.startswith("bits_") else f"{100 * SHARE:g} point"


def difference_words(value: float, metric: str, *, signed: bool = False, unit: bool = True) -> str:
    """A difference of two figures: shares in points."""
    share = metric.endswith(SHARES)
    value = 100 * value if share else value
    places = (1 if abs(value) >= 1 else 2) if share else (3 if abs(value) >= 0.01 else 4)
    said = f"{abs(value):,.{places}f}"
    if signed:
        said = ("−" if value < 0 else "+") + said
    return f"{said} points" if share and unit else said


def could_words(verdict: Verdict, metric: str) -> str:
    """Of seeds that tell nothing apart: the smallest difference that they could have shown, and how many would show the
    one that was seen."""
    shown = difference_words(verdict.detectable or 0.0, metric)
    seen = difference_words(abs(verdict.pairs.mean or 0.0), metric)
    many = f"{verdict.seeds:,}" if verdict.seeds is not None else "more than 1,000"
    return f"these {len(verdict.pairs)} seeds could have shown {shown}; {many} seeds would show the {seen} seen"
