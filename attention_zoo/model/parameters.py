"""How many parameters, and whether models that are compared have about as many."""

from __future__ import annotations

from collections.abc import Mapping

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
