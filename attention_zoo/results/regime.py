"""What a comparison makes equal for all its backends, and what has to differ for it: rows that differ there are still
comparable, under the regime's name."""

from __future__ import annotations

from collections.abc import Mapping

from attention_zoo.results.row import Row

DIFFERS: Mapping[str, tuple[str, ...]] = {
    "steps": (),
    "flops": ("steps",),
    "seconds": ("steps",),
    "parameters": ("model.feed_forward",),
    "keys": (),
}
"""Regime -> keys of a training's config, dotted where nested, that it lets differ; options of mechanisms always may."""
REGIMES = tuple(DIFFERS)


def may_differ(row: Row) -> tuple[str, ...]:
    """Keys of a training's config, with all below them, that may differ between the rows of its comparison."""
    chosen = ("optimizer.lr", "rates") if row.get("rates") else ()
    return (*DIFFERS.get(str(row.get("regime") or "steps"), ()), *chosen)


def differs_by_regime(row: Row, key: str) -> bool:
    """Whether a key of the config may differ."""
    return any(key == each or key.startswith(f"{each}.") for each in may_differ(row))
