"""How long a call takes: warmed up, synchronised, repeated, with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from attention_zoo.contract import at_least

WARM_S = 0.1
"""Warm-up goes on this long, so that short calls meet grown allocators and awake threads."""
WARM_CALLS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over its repeats: the median to compare, the extremes to judge the noise."""

    seconds: float
    seconds_min: float
    seconds_max: float
    repeats: int
    warmup: int


def time_call(
    call: Callable[[], object],
    *,
    device: str | torch.device = "cpu",
    repeats: int = 5,
    budget_s: float = 4.0,
    before: Callable[[], object] = lambda: None,
    first: AbstractContextManager[object] | None = None,
) -> Timing:
    """Time `call`: at least one warm-up and one repeat, whatever they cost.

    Args:
        call: takes nothing.
        device: synchronised before each start and after each end.
        repeats: at most so many.
        budget_s: no further repeat starts once warm-up and repeats together have used this.
        before: runs before each call, outside of the clock (fresh inputs, gradients set to None).
        first: entered around the first warm-up call alone, to observe what is not timed.
    """
    at_least(1, repeats=repeats)
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing

    def once() -> float:
        before()
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        return time.perf_counter() - start

    with first or nullcontext():
        spent, warmup = once(), 1
    while spent < min(WARM_S, budget_s) and warmup < WARM_CALLS:
        spent += once()
        warmup += 1
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and spent < budget_s):
        seconds.append(once())
        spent += seconds[-1]
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), warmup)


def matmul_rate(*, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOPs a second of a square matrix product, the best of several: what this process could reach right now.

    On a CPU half precision is timed in float32, since torch's half matmul there is up to a hundred times slower than
    what kernels really use (they cast their tiles).
    """
    cuda = torch.device(device).type == "cuda"
    kind = dtype if cuda or dtype not in (torch.bfloat16, torch.float16) else torch.float32
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(kind)
    out = torch.empty_like(a)
    timing = time_call(lambda: torch.mm(a, a, out=out), device=device, repeats=8, budget_s=0.15)
    return 2 * size**3 / timing.seconds_min


def _nothing() -> None:
    pass
