"""Verdicts hold: what is false comes as rarely as promised, what is true as often, and odd values end in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from attention_zoo.statistics import Pairs, detectable, judge, power_of, preset_seeds, seeds_needed
from attention_zoo.statistics.family import decide, levels, rejected
from attention_zoo.statistics.paired import ALIKE, p_different, p_equivalent
from attention_zoo.statistics.power import ALPHA, MOST, seeds_for

DRAWS = 4000
ERROR = 3 * math.sqrt(ALPHA * (1 - ALPHA) / DRAWS)
"""Three binomial standard errors of a share of 5 % in so many draws: 1.03 points."""
SIZES = (1, 2, 3, 4, 8, 13)

Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
NOISES: dict[str, Noise] = {  # of the scores of one mechanism over seeds, all of mean 0
    "normal": lambda random, shape: random.normal(size=shape),
    "skewed": lambda random, shape: random.exponential(size=shape) - 1,
    "bimodal": lambda random, shape: random.choice([-1.0, 1.0], size=shape) + 0.3 * random.normal(size=shape),
    "rare failure": lambda random, shape: 0.1 - (random.random(shape) < 0.1) + 0.02 * random.normal(size=shape),
    "heavy tails": lambda random, shape: random.standard_t(3, size=shape),
}


def differences(noise: Noise, comparisons: int, seeds: int, shift: object = 0.0, key: int = 0) -> np.ndarray:
    """[DRAWS, k, n] of scores that share what their seed does to all: `noise` of each, full attention's once."""
    random = np.random.default_rng([comparisons, seeds, key])
    together = 5 * random.normal(size=(DRAWS, 1, seeds))
    full = noise(random, (DRAWS, 1, seeds)) + together
    return noise(random, (DRAWS, comparisons, seeds)) + together + np.asarray(shift)[..., None] - full


def verdicts(given: np.ndarray, margin: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    return decide(p_different(given), p_equivalent(given, margin))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("comparisons", SIZES)
def test_equal_mechanisms_are_rarely_called_different(noise: str, comparisons: int) -> None:
    given = differences(NOISES[noise], comparisons, preset_seeds(comparisons))
    different, _ = verdicts(given)
    assert different.any(-1).mean() <= ALPHA + ERROR


@pytest.mark.parametrize("seeds", [2, 3, 5, 7, 20])
def test_so_it_is_with_any_number_of_seeds(seeds: int) -> None:
    for noise in ("normal", "skewed"):
        different, _ = verdicts(differences(NOISES[noise], 4, seeds))
        assert different.any(-1).mean() <= ALPHA + ERROR


@pytest.mark.parametrize("noise", ["normal", "skewed"])
@pytest.mark.parametrize("comparisons", SIZES)
@pytest.mark.parametrize("margin", [1.0, 4.0, 12.0])
def test_false_verdicts_of_both_kinds_together_are_rare(noise: str, comparisons: int, margin: float) -> None:
    """Some mechanisms equal full attention, the others are exactly the margin away, on either side."""
    seeds = preset_seeds(comparisons)
    for equal in sorted({0, 1, comparisons // 2, comparisons}):
        side = np.where(np.arange(comparisons) % 2 == 0, margin, -margin)
        shift = np.where(np.arange(comparisons) < equal, 0.0, side)
        given = differences(NOISES[noise], comparisons, seeds, shift, key=equal)
        different, equivalent = verdicts(given, margin)
        false = np.where(shift == 0, different, equivalent)
        assert false.any(-1).mean() <= ALPHA + ERROR


@pytest.mark.parametrize("scale", [0.05, 0.2, 1.0])
def test_at_the_very_margin_hardly_any_is_called_as_good(scale: float) -> None:
    random = np.random.default_rng(7)
    given = 1 + scale * random.normal(size=(DRAWS, 1, 7))
    _, equivalent = verdicts(given)
    assert equivalent.mean() <= ALPHA + ERROR
    _, equivalent = verdicts(given - 1)
    assert equivalent.mean() > 0.9 or scale > 0.2, "and equal ones with little spread nearly always are"


@pytest.mark.parametrize("comparisons", SIZES)
def test_a_gap_of_two_standard_deviations_is_found_in_each_comparison(comparisons: int) -> None:
    """Where all others are equal, so that no step of Holm's helps; with the seeds that are asked for."""
    random = np.random.default_rng(comparisons)
    given = random.normal(size=(DRAWS, comparisons, seeds_needed(comparisons)))
    given[:, 0] += 2
    different, _ = verdicts(given, 0.1)
    found = (different[:, 0] & (given[:, 0].mean(-1) > 0)).mean()
    assert found >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / DRAWS)
    assert found == pytest.approx(power_of(seeds_needed(comparisons), 2, ALPHA / comparisons), abs=0.02)
    every, _ = verdicts(random.normal(size=given.shape) + 2, 0.1)
    assert every.mean(0).min() >= found - 0.02, "where all differ, in each at least as often"


def test_ties_and_rounding_make_no_differences() -> None:
    """Accuracies of few answers: most differences of equal mechanisms are 0 or one step."""
    random = np.random.default_rng(3)
    for answers in (10, 100, 1000):
        for comparisons in (1, 4):
            scores = random.binomial(answers, 0.97, size=(DRAWS, comparisons + 1, 7)) / answers
            different, _ = verdicts(scores[:, 1:] - scores[:, :1], 0.01)
            assert different.any(-1).mean() <= ALPHA + ERROR


def test_seeds_that_comparisons_need() -> None:
    """TASKS: five seeds find 2 standard deviations in 91 % alone, 37 % of ten at once, 7 % of 91; seven do for four."""
    assert [round(power_of(5, 2, ALPHA / k), 2) for k in (1, 10, 91)] == [0.91, 0.37, 0.07]
    assert seeds_needed(4) == 7
    assert [seeds_needed(k) for k in (1, 2, 3, 8, 9, 13)] == [5, 6, 6, 7, 8, 8]
    assert [preset_seeds(k) for k in (1, 2, 3, 4, 9)] == [7, 7, 7, 7, 8]
    assert seeds_needed(4, gap_in_sd=1.0) > seeds_needed(4, power=0.95) > 7
    for k in SIZES:
        assert power_of(seeds_needed(k), 2, ALPHA / k) >= 0.8 > power_of(seeds_needed(k) - 1, 2, ALPHA / k)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"comparisons": 0}, "comparisons must be an integer of at least 1, got 0"),
        ({"comparisons": 2.5}, "comparisons must be an integer of at least 1, got 2.5"),
        ({"comparisons": 4, "gap_in_sd": -1}, "gap_in_sd must be a positive number, got -1"),
        ({"comparisons": 4, "gap_in_sd": math.nan}, "gap_in_sd must be a positive number, got nan"),
        ({"comparisons": 4, "gap_in_sd": 0.01}, "gap_in_sd must be one that 1,000 seeds can show, got 0.01"),
        ({"comparisons": 4, "power": 1}, "power must be between 0 and 1, got 1"),
        ({"comparisons": 4, "alpha": 0.0}, "alpha must be between 0 and 1, got 0.0"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seeds_needed(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("seeds", [2, 3, 5, 7, 11, 12, 40])
@pytest.mark.parametrize("level", [0.05, 0.0125, 0.05 / 13])
def test_power_is_that_of_the_noncentral_t(seeds: int, level: float) -> None:
    for gap in (0.1, 0.5, 1.0, 2.0, 4.0):
        bound, shift = stats.t.isf(level / 2, seeds - 1), gap * math.sqrt(seeds)
        exact = stats.nct.sf(bound, seeds - 1, shift) + stats.nct.cdf(-bound, seeds - 1, shift)
        if math.isfinite(exact):
            assert power_of(seeds, gap, level) == pytest.approx(exact, abs=2e-4)
    assert 0 <= power_of(seeds, 100.0, level) <= 1, "where scipy's is NaN, too"


def test_the_smallest_gap_and_the_fewest_seeds_are_two_ways_to_ask_the_same() -> None:
    for seeds in (2, 5, 7, 30):
        gap = detectable(seeds, 0.0125)
        assert gap is not None
        assert power_of(seeds, gap, 0.0125) == pytest.approx(0.8, abs=1e-3)
        assert seeds_for(gap * 1.001, 0.0125) == seeds
    assert detectable(1, 0.05) is None
    assert seeds_for(1e-6, 0.05) is None
    assert seeds_for(0.0, 0.05) is None
    assert power_of(1, 5.0, 0.05) == 0
    assert power_of(MOST, 1.0, 0.05) == pytest.approx(1)


def test_p_values_are_scipys_and_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    for seeds in (2, 3, 7, 31):
        own, full = random.normal(size=(2, seeds))
        assert p_different(own - full) == pytest.approx(stats.ttest_rel(own, full).pvalue)
        d = own - full
        t = [(d.mean() + sign * 0.3) / (d.std(ddof=1) / math.sqrt(seeds)) for sign in (1, -1)]
        expected = max(stats.t.sf(t[0], seeds - 1), stats.t.cdf(t[1], seeds - 1))
        assert p_equivalent(d, 0.3) == pytest.approx(expected)
    with pytest.raises(ValueError, match="margin must be a positive number, got 0"):
        p_equivalent([0.1, 0.2], 0)


def test_levels_leave_room_for_both_kinds_of_false_verdicts() -> None:
    for k in range(1, 30):
        steps, equivalence = levels(k)
        assert steps[0] == pytest.approx(ALPHA / k), "as Holm's first step"
        assert steps == sorted(steps)
        assert all(
            left * step + (k - left) * equivalence == pytest.approx(ALPHA) for left, step in zip(range(k, 0, -1), steps)
        )
    assert levels(1) == ([ALPHA], ALPHA)


def test_steps_go_on_until_one_hypothesis_stands() -> None:
    steps = [0.01, 0.02, 0.05]
    assert rejected([0.04, 0.005, 0.015], steps).tolist() == [True, True, True]
    assert rejected([0.04, 0.011, 0.015], steps).tolist() == [False, False, False]
    assert rejected([0.06, 0.001, 0.015], steps).tolist() == [False, True, True]
    assert rejected([[0.5, 0.5, 0.001], [1, 1, 1]], steps).tolist() == [[False, False, True], [False] * 3]


def pairs(own: list[float], full: list[float] | None = None) -> Pairs:
    return Pairs.of(enumerate(own), enumerate(full or [1.0] * len(own)))


def test_odd_values_end_without_warnings_and_divisions_by_zero() -> None:
    """Warnings are errors here."""
    family = {
        "identical": pairs([1.0] * 7),
        "constant": pairs([0.25] * 7),
        "rounding": pairs([x + 0.1 for x in range(7)], [float(x) for x in range(7)]),
        "identical but few": pairs([1.0] * (ALIKE - 1)),
        "constant but few": pairs([0.25] * 2),
        "one": pairs([0.5]),
        "none": pairs([]),
        "nan": pairs([math.nan] * 7),
        "some broken": pairs([0.5, math.nan, math.inf, 0.51, 0.52, 0.49, 0.5]),
    }
    found = judge(family, 0.01)
    said = {name: (each.different, each.equivalent) for name, each in found.items()}
    assert said == {
        "identical": (False, True), "constant": (True, False), "rounding": (True, False),
        "identical but few": (False, False), "constant but few": (False, False), "one": (False, False),
        "none": (False, False), "nan": (False, False), "some broken": (True, False),
    }  # fmt: skip
    assert (family["nan"].broken, family["some broken"].broken, len(family["some broken"])) == (7, 2, 5)
    assert family["constant"].spread == 0
    assert [family[name].interval() for name in ("identical", "one", "none", "nan")] == [None] * 4
    assert family["none"].mean is None
    assert judge({}, 0.01) == {}


def test_seeds_of_one_mechanism_alone_are_left_out() -> None:
    found = Pairs.of([(0, 2.0), (1, 3.0), (1, 5.0), (4, 9.0)], [(0, 1.0), (1, 1.0), (2, 1.0)])
    assert found.differences == (1.0, 3.0), "two runs of one seed count as their mean"
    assert found.unpaired == 2


def test_what_a_verdict_says_beside_itself() -> None:
    random = np.random.default_rng(1)
    noise = random.normal(size=7)
    family = {"far": pairs(list(10 + noise)), "near": pairs(list(1 + 0.1 * noise))}
    found = judge(family, 0.01)
    assert found["far"].different
    assert not found["near"].different
    steps, _ = levels(2)
    assert found["near"].level == steps[1], "the other one fell at the first step"
    near = found["near"]
    assert near.detectable is not None
    assert near.pairs.spread is not None
    assert near.pairs.mean is not None
    assert power_of(7, near.detectable / near.pairs.spread, near.level) == pytest.approx(0.8, abs=1e-3)
    assert near.seeds is None or near.seeds > 7
    low, high = near.pairs.interval() or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(near.pairs.mean)
    expected = stats.ttest_1samp(near.pairs.differences, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_a_small_difference_may_be_shown_and_be_within_the_margin() -> None:
    random = np.random.default_rng(2)
    (verdict,) = judge({"a": pairs(list(1.003 + 1e-4 * random.normal(size=7)))}, 0.01).values()
    assert (verdict.different, verdict.equivalent) == (True, True)
    (unknown,) = judge({"a": pairs(list(1.003 + 1e-4 * random.normal(size=7)))}, None).values()
    assert (unknown.different, unknown.equivalent) == (True, False), "without a margin none is as good"
