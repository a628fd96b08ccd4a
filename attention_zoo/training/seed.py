"""Every source of randomness of a run in one place: set, saved and restored together. So is all else that a run may
set for the whole process: the next run in it must find what it would find alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
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
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on where `random_state` was taken. CUDA generators are restored where as many devices are there."""
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))
    algorithm, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def contained() -> Iterator[None]:
    """What is set inside for the whole process is as it was afterwards: threads, generators, torch's defaults."""
    state = random_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    grad, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    exact, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(exact, warn_only=only_warn)
        for name, value in flags.items():
            setattr(cudnn, name, value)
        restore_random_state(state)
