"""Slow truths of mechanisms that are no patterns: one file a backend with `reference(layer, x, tokens) -> hidden`."""

from __future__ import annotations

import importlib
from pathlib import Path

from attention_zoo.testing import Reference


def reference_of(name: str) -> Reference | None:
    """The loop of a backend, or None where it has none."""
    if not (Path(__file__).parent / f"{name}.py").is_file():
        return None
    return importlib.import_module(f"references.{name}").reference
