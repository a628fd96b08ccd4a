"""How many parameters, and whether models that are compared have about as many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_count(module: nn.Module) -> int:
    """All parameters, shared ones once. Nothing is excluded."""
    return sum(parameter.numel() for parameter in module.parameters())


def unequal(counts: Mapping[str, int], tolerance: float = 0.10) -> list[str]:
    """A sentence for each model that has over `tolerance` more parameters than the smallest one.

    Long Range Arena's rule (Tay et al. 2021): models that are compared differ by at most 10 %.
    """
    if not counts:
        return []
    smallest = min(counts, key=lambda name: counts[name])
    base = counts[smallest]
    return [
        f"{name} has {100 * (count / base - 1):.0f} % more parameters than {smallest} ({count:,} against {base:,})"
        for name, count in counts.items()
        if count > (1 + tolerance) * base
    ]


def current_names(weights: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Weights by their names today.

    Global tokens once stood beside the stack as `extra`, now they stand around it; a gated convolution's taps were its
    `conv.weight`.
    """
    old, stack, gated = f"{prefix}extra.", f"{prefix}stack.", "body.layers.0.conv.weight"
    moved = f"{old}embedding" in weights
    renamed = {}
    for name, value in weights.items():
        if name.endswith(gated) and value.ndim == 2:
            name = f"{name.removesuffix('conv.weight')}weight"
        if moved and name.startswith(stack):
            name = f"{stack}inner.{name.removeprefix(stack)}"
        renamed[f"{stack}{name.removeprefix(old)}" if moved and name.startswith(old) else name] = value
    return renamed
