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
LONG_S = 20.0
"""A first call that took longer is the timing: what warming up saves is lost in it, and another would be as long."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over its repeats: the median to compare, the extremes to judge the noise.

    `cpu_seconds` is the median of what this process computed, all threads together: on a quiet machine and one thread
    as much as `seconds`; less tells that other work had the cores.
    """

    seconds: float
    seconds_min: float
    seconds_max: float
    repeats: int
    warmup: int
    cpu_seconds: float


def time_call(
    call: Callable[[], object],
    *,
    device: str | torch.device = "cpu",
    repeats: int = 5,
    budget_s: float = 4.0,
    before: Callable[[], object] = lambda: None,
    first: AbstractContextManager[object] | None = None,
) -> Timing:
    """Time `call`: at least one warm-up and one repeat, unless the first call is longer than `LONG_S`.

    Args:
        call: takes nothing.
        device: synchronised before each start and after each end.
        repeats: at most so many.
        budget_s: no further repeat starts once warm-up and repeats together have used this.
        before: runs before each call, outside of the clock (fresh inputs, gradients set to None).
        first: entered around the first warm-up call alone, to observe what is not timed.
    """
    at_least(1, repeats=repeats)

    def once() -> tuple[float, float]:
        before()
        return clock(call, device)

    with first or nullcontext():
        found = [once()]
    spent, warmup = found[0][0], 1
    if spent > LONG_S:
        return _timing(found, 0)
    while spent < min(WARM_S, budget_s) and warmup < WARM_CALLS:
        spent += once()[0]
        warmup += 1
    found = []
    while not found or (len(found) < repeats and spent < budget_s):
        found.append(once())
        spent += found[-1][0]
    return _timing(found, warmup)


def clock(call: Callable[[], object], device: str | torch.device = "cpu") -> tuple[float, float]:
    """Seconds of one call: on the wall, and of this process's computing."""
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    synchronise()
    start, computed = time.perf_counter(), time.process_time()
    call()
    synchronise()
    return time.perf_counter() - start, time.process_time() - computed


def _timing(found: list[tuple[float, float]], warmup: int) -> Timing:
    seconds, computed = zip(*found)
    return Timing(
        statistics.median(seconds), min(seconds), max(seconds), len(seconds), warmup, statistics.median(computed)
    )


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
