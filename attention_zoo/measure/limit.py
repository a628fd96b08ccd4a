"""A limit on memory, so that what takes too much fails here and now, and not elsewhere."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attention_zoo.measure.memory import data_bytes
from attention_zoo.measure.speed import matmul_rate


@contextmanager
def limited(limit_bytes: int | None, *, device: str | torch.device, threads: int) -> Iterator[None]:
    """Let this process have so much memory on top of what it holds now.

    On a CPU the data segment is limited: torch maps far more address space than it uses, so a limit on that would
    stop it long before. Only Linux enforces this. It ends with the context: telling what went wrong takes memory, too.
    On CUDA it stays.

    Args:
        limit_bytes: None: no limit.
        device: on which the work runs.
        threads: of torch; they come now: with no memory left for stacks the process would end.
    """
    if limit_bytes is None:
        yield
        return
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
        yield
        return
    torch.set_num_threads(threads)
    matmul_rate()  # threads and work space
    now = data_bytes()
    if now is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_at_most(now + limit_bytes, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _at_most(wanted: int, hard: int) -> int:
    return min(wanted, 2**62 if hard == resource.RLIM_INFINITY else hard)
