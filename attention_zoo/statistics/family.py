"""All comparisons of one task at one length: verdicts of which any is false with a probability of at most 5 %.

The family is every mechanism that was trained on the task at that length, against full attention alone, and of recall
both sides of its reach (`report.comparisons`); other tasks and lengths of a report are families of their own. Two
verdicts may be false: "different" where the difference is zero, and "as good" where it is the margin or more. No
difference is both, so that of k comparisons at most k can go wrong, z in the first way and k - z in the second.
Equivalence is tested at

    b = α / (2k - 1)                       each: all of α for one comparison, about α / 2k for many

and differences by Holm's steps (Holm 1979), which leave room for that: while z of them are not told apart yet, at

    a(z) = b + (α - k b) / z               a(k) = α / k, as Holm's first step; a(1) = α · k / (2k - 1)

The first false "different" comes while at least those z are open, so at no more than z · a(z) = α - (k - z) b, and a
false "as good" has (k - z) b: α together, whatever depends on what. A difference may well be shown and be within the
margin: both are said. Comparisons that cannot be tested still count in k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attention_zoo.statistics.paired import Pairs, p_different, p_equivalent
from attention_zoo.statistics.power import ALPHA, detectable, seeds_for


@dataclass(frozen=True)
class Verdict:
    """Of one comparison.

    Fields:
        pairs: what it rests on.
        different: whether its mean difference is shown to be another than zero; the mean has its sign.
        equivalent: whether it is shown to be smaller than the margin, either way.
        level: at which differences were tested last, in Holm's steps.
        detectable: the smallest difference that these seeds would have shown with a power of 80 % at that level, by
            the spread that they have; None where they have none.
        seeds: that would show the difference seen, likewise; None: more than a thousand, or nobody can say.
    """

    pairs: Pairs
    different: bool
    equivalent: bool
    level: float
    detectable: float | None = None
    seeds: int | None = None


def levels(comparisons: int, alpha: float = ALPHA) -> tuple[list[float], float]:
    """The levels at which differences are tested, from the first step to the last, and that of equivalence."""
    equivalence = alpha / (2 * comparisons - 1)
    rest = alpha - comparisons * equivalence
    return [equivalence + rest / left for left in range(comparisons, 0, -1)], equivalence


def rejected(p: ArrayLike, steps: ArrayLike) -> NDArray[np.bool_]:
    """[..., k], which of k hypotheses fall: the smallest p is held to the first level, and so on until one stands."""
    given = np.asarray(p, float)
    order = np.argsort(given, axis=-1, kind="stable")
    falls = np.logical_and.accumulate(np.take_along_axis(given, order, -1) <= np.asarray(steps), axis=-1)
    found = np.zeros_like(falls)
    np.put_along_axis(found, order, falls, axis=-1)
    return found


def decide(
    different: ArrayLike, equivalent: ArrayLike, alpha: float = ALPHA
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[..., k] each: which comparisons are different, and which equivalent, from their p values [..., k]."""
    p = np.asarray(different, float)
    steps, equivalence = levels(p.shape[-1], alpha)
    return rejected(p, steps), np.asarray(equivalent, float) <= equivalence


def judge(family: Mapping[str, Pairs], margin: float | None, alpha: float = ALPHA) -> dict[str, Verdict]:
    """Every verdict of one family.

    Args:
        family: the pairs of every mechanism on the task, those too of which nothing will be said.
        margin: difference below which a mechanism is as good; None: nobody knows one, so none is called so.
        alpha: probability of any false verdict.
    """
    if not family:
        return {}
    many = list(family.values())
    p, q = np.ones(len(many)), np.ones(len(many))
    for seeds in {len(pairs) for pairs in many} - {0, 1}:  # those of as many seeds at once
        alike = [place for place, pairs in enumerate(many) if len(pairs) == seeds]
        differences = np.array([many[place].differences for place in alike])
        p[alike] = p_different(differences)
        if margin is not None:
            q[alike] = p_equivalent(differences, margin)
    different, equivalent = decide(p, q, alpha)
    steps, _ = levels(len(many), alpha)
    level = steps[min(int(different.sum()), len(many) - 1)]
    return {
        name: _verdict(pairs, bool(yes), bool(near), level)
        for name, pairs, yes, near in zip(family, many, different, equivalent)
    }


def _verdict(pairs: Pairs, different: bool, equivalent: bool, level: float) -> Verdict:
    if different or equivalent or not pairs.spread or pairs.mean is None:
        return Verdict(pairs, different, equivalent, level)
    gap = detectable(len(pairs), level)
    return Verdict(
        pairs, different, equivalent, level,
        None if gap is None else gap * pairs.spread, seeds_for(abs(pairs.mean) / pairs.spread, level),
    )  # fmt: skip
