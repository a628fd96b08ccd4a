"""Every source of randomness of a run in one place: set, saved and restored together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python, numpy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all generators, as tensors and plain values."""
    version, internal, cached = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)  # always a tuple for the global generator
    algorithm, keys, place, has_gauss, gauss = numpy_state
    return {
        "python": [version, list(internal), cached],
        "numpy": [algorithm, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken. CUDA generators are restored where as many devices are there."""
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))
    algorithm, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
