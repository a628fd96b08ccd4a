"""Funnel: an encoder whose blocks hold fewer and fewer tokens, and a decoder for each token. Dai et al. 2020.

    h1 = block_1(x);  h2 = block_2(mean(h1, 2));  h3 = block_3(mean(h2, 2)) ...
    with a decoder    out = decoder(h1 + repeat(h_n))
    without           out = repeat(h_n)

`"4@1 4@2 4@4 2@1"`: three blocks of 4 layers, each over half of the tokens of the one before, and a decoder of 2
layers, the last part at factor 1. Heads that answer for each token need the decoder; `classify` does not.

Paper: arXiv:2006.03236.

Released code: laiguokun/Funnel-Transformer; transformers' `FunnelModel`.

Here: `keys` says what the first attention of a shorter block sees: `all`, as in the paper, the tokens before they were
pooled, its queries alone being pooled (`pool_q_only` in transformers), which takes a mechanism that attends across,
norms behind additions as in the paper, and positions that are added to embeddings; or `pooled`, the default, what its
queries are, which any mechanism can do. The first token is pooled like others (`separate_cls=False`). Groups are
counted over the valid tokens of each document, and the last is the mean of what is there; theirs are counted over
columns, and one with padding is left out. Without a decoder the hidden states stay as many as the tokens, each its
group's: the mean over them is that over groups weighted by their tokens. Position schemes are the zoo's own: the
released code's, relative with token types in the scores, is not here, so that its checkpoints do not fit.

Cost: a layer at factor f costs what it costs for L / f tokens; with `keys=all` and full attention the first of a block
has as many keys as the block before. Full attention stays quadratic, by a smaller factor.

When: one answer for a long text. Two-sided alone: a group holds tokens after its first. With model=tiny and one seed
"1@1 1@2" answers task=marked, whether two symbols anywhere are equal, as well as two layers over all tokens: 99.5 and
99.9 %; task=listops is learned by neither in 300 steps (30.8 and 32.2 %; the first token alone tells 33.9 %).

Checked: against a loop over documents and groups in float64 (tests/references/shorten.py), and against transformers'
`FunnelModel` on the same weights, with either keys and at lengths that no factor divides, its terms of positions and
types at zero (tests/test_funnel_peer.py, 1e-11): outputs and gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from attention_zoo.contract import Layer
from attention_zoo.model.block import Stack
from attention_zoo.model.factors import Part, check_descent, written
from attention_zoo.model.level import Level
from attention_zoo.model.resample import Pool, Up
from attention_zoo.options import check_values
from attention_zoo.rules import OneOf, Unsupported

EXAMPLE = "4@1 4@2 4@4 2@1"
DEFAULTS = {"keys": "pooled"}
MEANINGS = {"keys": "what the first attention of a shorter block sees: pooled, or all, the tokens before"}
RULES = {"keys": Annotated[str, OneOf("pooled", "all")]}


def check(parts: Sequence[Part], options: Mapping[str, Any], *, causal: bool, head: str, **model: Any) -> None:
    """Raise a ValueError for what is no funnel.

    Args:
        model: options of the model that are on or off: cross, pre_norm.
    """
    check_values(RULES, options)
    if causal:
        raise Unsupported("shorten=funnel", "causal=True", "a pooled token holds later ones", "shorten=hourglass")
    decoder = parts[-1].factor == 1
    check_descent(parts[:-1] if decoder else parts)
    if len(parts) < 2 + decoder:
        raise ValueError(f"shorten=funnel needs a part with a factor above 1, as {EXAMPLE!r}, got {written(parts)!r}")
    if not decoder and head != "classify":
        raise ValueError(
            f"shorten=funnel needs a decoder, a last part at factor 1 as in {EXAMPLE!r}, for head={head}, got "
            f"{written(parts)!r}"
        )
    if options["keys"] == "all":
        name = "shorten=funnel with keys=all"
        if model["cross"]:
            raise Unsupported(name, "cross=True", "blocks have one source, here the tokens", "keys=pooled")
        if model["pre_norm"]:
            raise Unsupported(name, "pre_norm=True", "keys would come without their norm", "pre_norm=false")


def across(parts: Sequence[Part], options: Mapping[str, Any]) -> frozenset[int]:
    """See `shorten.Shape`: the first block of each part that is shorter than the one before."""
    starts = itertools.accumulate(part.layers for part in parts)
    shorter = [start for start, (one, two) in zip(starts, itertools.pairwise(parts)) if two.factor > one.factor]
    return frozenset(shorter if options["keys"] == "all" else ())


def build(
    stacks: Sequence[tuple[int, Layer]], options: Mapping[str, Any], *, dim: int, heads: int, causal: bool, norm: Any
) -> Layer:
    """The levels, from the innermost on.

    Args:
        stacks: each part's factor and blocks.
    """
    decoder = stacks[-1][1] if stacks[-1][0] == 1 else None
    blocks = stacks if decoder is None else stacks[:-1]
    inside = blocks[-1][1]
    for index in reversed(range(len(blocks) - 1)):
        size = blocks[index + 1][0] // blocks[index][0]
        after = decoder if decoder is not None and not index else Stack([])
        shared: dict[str, Any] = {"dim": dim, "heads": heads, "norm": norm}
        pool, up = Pool("mean", size, **shared), Up("repeat", size, residual=after is decoder, **shared)
        unpooled = options["keys"] == "all"
        inside = Level(blocks[index][1], inside, after, pool=pool, up=up, causal=causal, unpooled=unpooled)
    return inside
