"""What each token sees, found by asking the layer itself: change one token and watch which outputs move.

This takes any layer that answers the contract, third-party ones included, and no knowledge of the mechanism:

- *seen*: output i moves when input j does. Discrete choices of the first call (LSH buckets) are replayed, so that what
  moves is what a value reaches, not a chunk border that shifted.
- *seen with gradient*: d output i / d input j is not zero. Memory that is detached is seen without gradient.

Cost: two forward calls and one backward on L copies of a row of L tokens. The diagonal also shows a
token as its own query, where a mechanism does not attend to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attention_zoo.contract import Layer, Unsupported
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.environment import environment
from attention_zoo.measure.identity import identity
from attention_zoo.registry import build, recipe
from attention_zoo.results.row import PortraitRow, Row

UNSEEN, VALUE, GRADIENT = 0, 1, 2
"""What a pair of (query, key) can be: not seen, seen without gradient, seen with gradient."""

TOLERANCE = 1e-10
"""Smallest movement that counts, in float64: rounding stays near 1e-16, an attended token moves outputs by far more."""


def visible(layer: Layer, length: int, *, dim: int, seed: int = 0) -> Int[Tensor, "L L"]:
    """Which inputs reach which outputs of a layer.

    Args:
        layer: in float64 and evaluation mode.
        length: number of tokens L.
        dim: model width of the layer.
        seed: of the random inputs; they only need to be in general position.

    Returns:
        [queries, keys] of UNSEEN, VALUE or GRADIENT.
    """
    drawn = torch.Generator().manual_seed(seed)
    row = torch.randn(length, dim, dtype=torch.float64, generator=drawn)
    shift = torch.randn(length, dim, dtype=torch.float64, generator=drawn)
    every = torch.arange(length)
    x = row.repeat(length, 1, 1).requires_grad_()
    before = layer(x)
    moved = x.detach().clone()
    moved[every, every] += shift  # copy j differs from the others in token j alone
    with torch.no_grad():
        after = layer(moved, choices=before.choices)
    seen = ((after.hidden - before.hidden).abs().amax(-1) > TOLERANCE).T
    cotangent = torch.zeros_like(before.hidden)
    cotangent[every, every] = shift  # copy i asks for the gradient of output i alone
    (gradient,) = torch.autograd.grad(before.hidden, x, cotangent)
    felt = gradient.abs().amax(-1) > TOLERANCE
    return torch.where(felt, GRADIENT, torch.where(seen, VALUE, UNSEEN))


def portrait(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    length: int = 96,
    dim: int = 32,
    heads: int = 1,
    seed: int = 0,
) -> PortraitRow:
    """A row of kind "portrait": the abilities that a backend declares and the pairs that it sees, causal.

    Args:
        name: of the backend.
        options: its own, small enough that `length` tokens show the pattern; default the class's `tiny`.
        length: number of tokens.
        dim, heads: of the layer; with several heads, a key counts as seen where one of them sees it.
        seed: of links, hashes and inputs.

    Returns:
        a row; whatever goes wrong is recorded in it as status "failed" (or "unsupported", what a mechanism does not
        do), so that one backend cannot stop a report.
    """
    sizes = {"length": length, "dim": dim, "heads": heads, "seed": seed}
    given: dict[str, Any] = {"kind": "portrait", "name": name, **sizes}
    known = None
    try:
        cls, _ = recipe(name)
        given["options"] = dict(cls.tiny if options is None else options)
        known = identity(given, device="cpu", threads=torch.get_num_threads())
        layer = build(name, dim=dim, heads=heads, causal=True, seed=seed, **given["options"]).double().eval()
        pairs = visible(layer, length, dim=dim, seed=seed)
        abilities = asdict(layer.abilities)
    except Exception as error:  # recorded, not hidden: the report lists it
        return {
            "id": known, "config": given, "kind": "portrait", "backend": name, "length": length,
            "environment": environment(),
            "status": "unsupported" if isinstance(error, Unsupported) else "failed",
            "error": f"{type(error).__name__}: {error}".splitlines()[0],
        }  # fmt: skip
    return {
        "kind": "portrait", "backend": name, "length": length, "environment": environment(), "id": known,
        "config": given, "status": "ok", "error": None, "abilities": abilities,
        "pairs": ["".join(map(str, line)) for line in pairs.tolist()],
    }  # fmt: skip


def unseen(name: str, length: int, given: dict[str, Any], ended: Ended) -> PortraitRow:
    """The row of a portrait whose process gave none.

    Args:
        given: what `portrait` was asked for.
    """
    return {
        "kind": "portrait", "id": None, "backend": name, "status": ended.status, "error": ended.reason,
        "length": length, "environment": environment(), "config": given,
    }  # fmt: skip


def pairs_of(row: Row) -> list[list[int]]:
    """The pairs of a portrait row, [query][key]."""
    return [[int(digit) for digit in line] for line in row["pairs"]]


def told(row: Row) -> dict[str, Any]:
    """What a portrait says in numbers: for readers who cannot see it."""
    pairs = pairs_of(row)
    length = len(pairs)
    seen = [[j for j, kind in enumerate(line) if kind] for line in pairs]
    total = sum(map(len, seen))
    return {
        "share of the causal half": total / (length * (length + 1) / 2),
        "keys a query, mean": total / length,
        "keys a query, most": max(map(len, seen)),
        "farthest key seen": max((i - line[0] for i, line in enumerate(seen) if line), default=0),
        "pairs without gradient": sum(line.count(VALUE) for line in pairs),
    }
