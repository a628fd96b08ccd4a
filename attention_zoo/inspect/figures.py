"""Figures of each head: its weights in blocks, how far it looks, how sharply, beyond a window and on sinks."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.inspect.probe import Call
from attention_zoo.inspect.rows import is_plain, rows


def figures(call: Call, *, window: int, sinks: int, blocks: int, exact: int) -> dict[str, Any]:
    """Of one layer, as plain values, each a list over its heads.

    Args:
        window: tokens beyond which a token counts as far.
        sinks: first tokens of the text that count as sinks.
        blocks: at most so many on each side of the pooled weights.
        exact: texts up to so many tokens are asked token by token; of longer ones entropy and the share beyond the
            window, which need every single weight, are null, but for patterns, whose definition gives them by rows.

    Returns:
        blocks [H][query block][key block], mean weight of a query on a block; mass, share on tokens at all; sinks;
        distance, mean in tokens (null where two-sided and not exact); entropy in bits; outside.
    """
    L, place = call.length, torch.arange(call.length)
    count = min(blocks, L)
    home = place * count // L
    sets = torch.zeros(L, count + 3)
    sets[place, home] = 1
    sets[:, count], sets[:sinks, count + 1], sets[:, count + 2] = 1, 1, place / L
    found = call.weights(sets).double().cpu()
    pooled = torch.zeros(len(found), count, count, dtype=torch.float64).index_add_(1, home, found[..., :count])
    pooled = pooled / torch.bincount(home, minlength=count)[:, None]
    mass = found[..., count]
    entropy = outside = distance = None
    if is_plain(call):
        entropy, outside, distance = (each.mean(1).tolist() for each in _row_by_row(call, window))
    elif exact >= L:
        entropy, outside, distance = (each.mean(1).tolist() for each in _token_by_token(call, window))
    elif call.layer.causal:
        distance = (place * mass - found[..., count + 2] * L).mean(1).tolist()
    return {
        "layer": call.name,
        "blocks": pooled.tolist(),
        "mass": mass.mean(1).tolist(),
        "sinks": found[..., count + 1].mean(1).tolist(),
        "distance": distance,
        "entropy": entropy,
        "outside": outside,
    }


def _row_by_row(call: Call, window: int) -> tuple[Float[Tensor, "H L"], ...]:
    """As `_token_by_token`, from some queries at a time."""
    place, found = torch.arange(call.length), list[tuple[Tensor, ...]]()
    for some, weights in rows(call):
        weights = weights.cpu()
        far = (place[some, None] - place).abs().to(weights)
        bits = -torch.special.xlogy(weights, weights).sum(-1) / math.log(2)
        found.append((bits, (weights * (far > window)).sum(-1), (weights * far).sum(-1)))
    return tuple(torch.cat(parts, 1).double() for parts in zip(*found))


def _token_by_token(call: Call, window: int) -> tuple[Float[Tensor, "H L"], ...]:
    """Entropy, share beyond the window and mean distance of each query, from a few columns of weights at a time."""
    L, width = call.length, call.layer.head_width
    place = torch.arange(L)
    sums = [torch.zeros(call.layer.heads, L, dtype=torch.float64) for _ in range(3)]
    for a in range(0, L, width):
        some = place[a : a + width]
        weights = call.weights((place[:, None] == some).float()).double().cpu().clamp(min=0)
        far = (place[:, None] - some).abs()
        sums[0] -= torch.special.xlogy(weights, weights).sum(-1) / math.log(2)
        sums[1] += (weights * (far > window)).sum(-1)
        sums[2] += (weights * far).sum(-1)
    return tuple(sums)
