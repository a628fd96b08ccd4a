"""Hourglass: a stack that is shorter in its middle, and whose levels add what they found. Nawrot et al. 2021.

    x -> before(x) = h;  h + up(inside(pool(shift(h, k - 1), k)));  after           for each level, from outside in

`"2@1 8@3 2@1"`: 2 layers over all tokens, 8 over a third as many, 2 over all again; factors are a palindrome, of any
depth: `"1@1 2@2 4@4 2@2 1@1"`.

Paper: arXiv:2110.13711, algorithm 1. The shift is by k - 1 at each level: then a group holds no token after the first
that reads it. Two-sided stacks are not shifted.

Released code: google/trax, `models/research/hourglass.py`; attention between the levels by default, and no prediction
token by token. A shift once before all levels, or by another number, leaks or loses tokens.

Here: groups are counted over the valid tokens of each document; the zeros before its start count in a causal mean, as
in the paper, and in a two-sided mean the last group is of what is there. Attention between levels is local, over
`reach` groups, where the paper's is over all: `model.resample`. Between two groups a decoding step runs the outer
levels alone. The whole stack has one width.

Cost: of L tokens a layer at factor f takes what it takes for L/f, in time, memory and state: full attention stays
quadratic with the factor 1/f² at those layers, and what is linear stays linear. A train step of twelve layers of width
128 over 1,024 tokens (`python -m experiments.benchmark grid=model heads=2`) has its peak at 101 MiB, as `2@1 8@3 2@1`
at 59, as `1@1 2@3 6@9 2@3 1@1` at 38; over 4,096 tokens it takes 3.8, 2.0 and 1.0 s of one core with full attention,
3.0, 1.2 and 0.9 s with longformer. Beside hourglass-transformer-pytorch (`grid=model_peers`): 2.8 times faster.

When: long sequences of small units (bytes, pixels), where neighbours say much of the same, and a step shall cost less.
Layers that must tell single tokens apart from afar belong outside of the middle: what is alike there is a group.
Trained at width 64 on one core, one seed: Python source (rows of 1,024 bytes), 13 minutes of both at once, `1@1 4@4
1@1` 3.36 bits a byte after 191 steps, six layers 3.58 after 110. Recall of pairs (mqar, rows of 64), six minutes of
both at once, full attention between two layers of longformer ±4: over all tokens 99 % of answers, at `1@1 1@4 1@1` 6 %.
With full attention in all three layers both learn it, in the layers over all tokens.

Checked: against a loop over documents and groups in float64 (tests/references/shorten.py, 1e-11), and against
hourglass-transformer-pytorch 0.0.6 on the same weights without its attention between levels (1e-12), outputs and
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from attention_zoo.contract import Layer
from attention_zoo.model.factors import Part, check_descent, written
from attention_zoo.model.level import Level
from attention_zoo.model.resample import POOLS, UPS, Pool, Up
from attention_zoo.options import check_values
from attention_zoo.rules import OneOf

EXAMPLE = "2@1 8@3 2@1"
DEFAULTS = {"pool": "linear", "up": "linear", "reach": 4}
MEANINGS = {
    "pool": f"how k tokens become one, {', '.join(POOLS)}: `model.resample`",
    "up": f"how one becomes k, {', '.join(UPS)}: `model.resample`",
    "reach": "groups that a token reads with up=attention, its own among them; two-sided as many after, too",
}
RULES = {
    "pool": Annotated[str, OneOf(*POOLS)],
    "up": Annotated[str, OneOf(*UPS)],
    "reach": Annotated[int, Field(ge=1, le=64)],
}


def check(parts: Sequence[Part], options: Mapping[str, Any], **model: Any) -> None:
    """Raise a ValueError for what is no hourglass."""
    check_values(RULES, options)
    factors = [part.factor for part in parts]
    if factors != factors[::-1] or len(parts) % 2 == 0:
        raise ValueError(
            f"shorten must have the factors of a palindrome, as {EXAMPLE!r}, got {written(parts)!r}; "
            f"a funnel has none: {{name: funnel, layout: ...}}"
        )
    check_descent(parts[: len(parts) // 2 + 1])


def across(parts: Sequence[Part], options: Mapping[str, Any]) -> frozenset[int]:
    """See `shorten.Shape`: none."""
    return frozenset()


def build(
    stacks: Sequence[tuple[int, Layer]], options: Mapping[str, Any], *, dim: int, heads: int, causal: bool, norm: Any
) -> Layer:
    """The levels, from the innermost on.

    Args:
        stacks: each part's factor and blocks.
    """
    middle = len(stacks) // 2
    inside = stacks[middle][1]
    reach = options["reach"] if options["up"] == "attention" else 1
    for index in reversed(range(middle)):
        size = stacks[index + 1][0] // stacks[index][0]
        shared: dict[str, Any] = {"dim": dim, "heads": heads, "norm": norm}
        pool, up = Pool(options["pool"], size, **shared), Up(options["up"], size, **shared)
        before, after = stacks[index][1], stacks[-1 - index][1]
        inside = Level(before, inside, after, pool=pool, up=up, reach=reach, causal=causal)
    return inside
