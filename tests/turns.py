"""Time of one call beside another, and what a layer's call takes by its FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from attention_zoo.measure.flops import LinearFlops, attention_flops, count_pairs


def flops_of(layer: Any, x: Tensor, times: int = 1) -> float:
    """Of one forward, projections and pairs."""
    with LinearFlops(layer) as linear:
        layer(x)
    pairs = count_pairs(layer, x.shape[1])
    assert pairs is not None
    attention = attention_flops(pairs, batch=len(x), heads=layer.heads, head_width=layer.head_width)
    return times * (linear.flops + attention)


def assert_within(allowed: float, ours: Callable[[], object], other: Callable[[], object], turns: int = 9) -> None:
    """Ours takes at most `allowed` times as long: medians of seconds of the processor, in turns, on until it holds."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for call, each in zip((ours, other), spent):
            start = time.process_time()
            call()
            each.append(time.process_time() - start)
        ratio = np.median(spent[0]) / np.median(spent[1])
        if turn > 1 and ratio <= allowed:
            return
    raise AssertionError(f"{ratio:.2f} times as long, allowed {allowed:.2f}: {spent}")
