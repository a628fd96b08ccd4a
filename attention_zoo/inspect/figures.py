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
    """Of one attention of a layer, as plain values, each a list over its heads.

    Args:
        window: tokens beyond which a token counts as far.
        sinks: first tokens of the text that count as sinks.
        blocks: at most so many on each side of the pooled weights.
        exact: up to so many keys are asked one by one; of more of them entropy and the share beyond the window, which
            need every single weight, are null, but for patterns, whose definition gives them by rows.

    Returns:
        layer, its name; number, of the layer; keys, what they are; blocks [H][query block][key block], mean weight of a
        query on a block; mass, share on the keys at all; share, of what the layer's two attentions add (null where it
        has one); entropy in bits. Of keys that are tokens also sinks, and of those of the same text distance, mean in
        tokens (null where two-sided and not exact), and outside.
    """
    L, S = call.asked, call.length
    rows_, columns = min(blocks, L), min(blocks, S)
    place, keys = torch.arange(L), torch.arange(S)
    home = place * rows_ // L
    sets = torch.zeros(S, columns + 3)
    sets[keys, keys * columns // S] = 1
    sets[:, columns], sets[:sinks, columns + 1], sets[:, columns + 2] = 1, 1, keys / S
    found = call.weights(sets).double().cpu()
    pooled = torch.zeros(len(found), rows_, columns, dtype=torch.float64).index_add_(1, home, found[..., :columns])
    pooled = pooled / torch.bincount(home, minlength=rows_)[:, None]
    mass = found[..., columns]
    entropy = outside = distance = None
    if is_plain(call):
        entropy, outside, distance = (each.mean(1).tolist() for each in _row_by_row(call, window))
    elif exact >= S:
        entropy, outside, distance = (each.mean(1).tolist() for each in _key_by_key(call, window))
    elif call.way.attention.causal:
        distance = (place * mass - found[..., columns + 2] * S).mean(1).tolist()
    share = call.share()
    return {
        "layer": call.name,
        "number": call.number,
        "keys": call.way.keys,
        "blocks": pooled.tolist(),
        "mass": mass.mean(1).tolist(),
        "share": None if share is None else share.tolist(),
        "sinks": found[..., columns + 1].mean(1).tolist() if call.way.keys != "state vectors" else None,
        "distance": distance if call.of_one_text else None,
        "entropy": entropy,
        "outside": outside if call.of_one_text else None,
    }


def _row_by_row(call: Call, window: int) -> tuple[Float[Tensor, "H L"], ...]:
    """As `_key_by_key`, from some queries at a time."""
    place = torch.arange(call.length)
    # made first: small results that are kept between large chunks would each cost the place of a chunk
    sums = [torch.zeros(call.layer.heads, call.length, dtype=torch.float64) for _ in range(3)]
    for some, weights in rows(call):
        weights = weights.cpu()
        far = (place[some, None] - place).abs().to(weights)
        sums[0][:, some] = -torch.special.xlogy(weights, weights).sum(-1).double() / math.log(2)
        sums[1][:, some] = (weights * (far > window)).sum(-1).double()
        sums[2][:, some] = (weights * far).sum(-1).double()
    return tuple(sums)


def _key_by_key(call: Call, window: int) -> tuple[Float[Tensor, "H L"], ...]:
    """Entropy, share beyond the window and mean distance of each query, from a few columns of weights at a time."""
    place, keys = torch.arange(call.asked), torch.arange(call.length)
    sums = [torch.zeros(call.layer.heads, call.asked, dtype=torch.float64) for _ in range(3)]
    for a in range(0, call.length, call.width):
        some = keys[a : a + call.width]
        weights = call.weights((keys[:, None] == some).float()).double().cpu().clamp(min=0)
        far = (place[:, None] - some).abs()
        sums[0] -= torch.special.xlogy(weights, weights).sum(-1) / math.log(2)
        sums[1] += (weights * (far > window)).sum(-1)
        sums[2] += (weights * far).sum(-1)
    return tuple(sums)
