"""Large scores, NaN in padding and masks refilled before backward, over random layers, kernels and layouts.

The truth is the definition (patterns) or the loop of tests/references, in float64, on the same weights.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator

import torch
from recorded import RECORDED
from references import reference_of
from torch import Tensor

from attention_zoo import Tokens, Unsupported
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention
from attention_zoo.testing import Case
from attention_zoo.testing.case import gradients

from . import Counts

TITLE = "large scores, NaN in padding, refilled masks, over kernels and layouts"
SMALL, LARGE = 150, 8_000
LENGTHS = (1, 2, 3, 7, 12, 13, 17, 29, 40, 61)
ROOM = 8
"""How many roundings of the largest score an error may be."""


def run(count: int, seed: int) -> Counts:
    """Throw `count` calls with backward."""
    found = Counts()
    for number in range(count):
        case = f"scores {seed}:{number}"
        found.tries += 1
        for way, problem in _throw(random.Random(case)):
            found.failed(way, f"{case}: {problem}")
    return found


def _throw(rng: random.Random) -> Iterator[tuple[str, str]]:
    """One call: what went wrong with it, if anything did."""
    name = rng.choice(RECORDED)
    case = Case.of(name, reference=reference_of(name))
    length, dtype = rng.choice(LENGTHS), rng.choice((torch.float32, torch.float32, torch.float64))
    options, causal = rng.choice(list(case.variants())), rng.choice(case.sides)
    layout, tokens = rng.choice(list(case.layouts(length)))
    size, filler, refill = 10 ** rng.uniform(-1, 2), rng.choice((0.0, math.nan, 1e4)), rng.random() < 0.5
    # rounded first, so that all see the same numbers
    layer = case.build(dtype=dtype, causal=causal, **options)
    x = (case.data(3, length, rng.randrange(1000)) * size).to(dtype)
    x = x.masked_fill(~tokens.valid[..., None], 0)
    fast = copy.deepcopy(layer)
    if isinstance(fast, PatternAttention):
        fast.kernel = rng.choice(["auto", *(each.name for each in fast.kernels)])
    said = (
        f"{name} {options} causal={causal} kernel={getattr(fast, 'kernel', '')} {dtype} length={length} {layout} "
        f"inputs of {size:.3g} padding {filler} refilled {refill}"
    )
    try:
        hidden, choices, found = _fast(fast, x.masked_fill(~tokens.valid[..., None], filler), tokens, refill)
    except Unsupported:
        return  # a named kernel that says no by name
    except Exception as error:  # whatever escapes is what this looks for
        if "modified by an inplace operation" not in str(error):  # torch's own word for a refilled mask
            yield "raw", f"{said}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    truth, slopes = _slow(case, copy.deepcopy(layer).double(), x.double(), tokens, choices)
    # a score is rounded to its own size times eps, and weights and all gradients with it
    largest = max(float(each.abs().max()) for each in (truth, *slopes.values()))
    allowed = ROOM * torch.finfo(dtype).eps * _largest_score(layer, x) * max(largest, 1e-6)
    for what, ours, true in [("output", hidden, truth), *((f"gradient of {k}", found[k], slopes[k]) for k in slopes)]:
        if what in ("output", "gradient of x"):
            ours, true = ours[tokens.valid], true[tokens.valid]
        error = float((ours.double() - true).abs().max()) if true.numel() else 0.0
        if not error <= allowed:  # NaN, too
            yield "wrong", f"{said}: {what} is off by {error:.2g}, allowed {allowed:.2g}"
            return


def _largest_score(layer: Attention, x: Tensor) -> float:
    """A bound, and at least 1: by Cauchy and Schwarz over all queries and keys, whatever sees what."""
    q, k = (getattr(layer, name, None) or layer.to_qk for name in ("to_q", "to_k"))
    norms = [1 + float(to(x.detach()).detach().norm(dim=-1).max()) for to in (q, k)]
    return max(1.0, norms[0] * norms[1] * abs(getattr(layer, "scale", 1.0)))


def _fast(layer: Attention, x: Tensor, tokens: Tokens, refill: bool) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, choices and gradients of a call whose mask may be refilled before backward, as a data loader does."""
    x.requires_grad_()
    buffers = Tokens(*(field.clone() for field in tokens))
    out = layer(x, buffers)
    if refill:
        for field in buffers:
            field.copy_(field.flip(0).logical_not() if field.dtype == torch.bool else field.flip(0))
    return out.hidden.detach(), out.choices, gradients(layer, x, out.hidden, tokens.valid)


def _slow(
    case: Case, layer: Attention, x: Tensor, tokens: Tokens, choices: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the definition or the loop, in the dtype of the layer."""
    x = x.detach().clone().requires_grad_()
    if isinstance(layer, PatternAttention):
        layer.kernel = "dense"
        out = layer(x, tokens).hidden
    else:
        assert case.reference is not None
        given = {} if choices is None else {"choices": choices}
        out = case.reference(layer, x, tokens, **given)
    return out.detach(), gradients(layer, x, out, tokens.valid)
