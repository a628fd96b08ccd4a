"""How many bytes a call needs at its worst moment, and how many a recurrent state holds.

On a CPU the profiler records every allocation and release of tensor memory, temporaries inside kernels included (a
dispatch-mode tracker misses those, and the resident set carries 16 to 90 MB of allocator noise). Replaying the events
as a running sum gives the exact peak. On CUDA the caching allocator counts for us.

Every figure is relative to the start of the call: inputs, parameters and whatever else lived before do not count;
outputs and gradients that the call creates do.

Beside it stands the growth of the resident set, which the system counts: what an allocator keeps and pages of libraries
that a first call touches are in it, so that it is the upper bound of the two.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

CPU_METHOD = "torch profiler memory events, tensor bytes above the start of the call"
_NOTES = b"USDT:", b"CPUAllocator.cpp"
CUDA_METHOD = "torch.cuda.max_memory_allocated, bytes above the start of the call"


@dataclass(frozen=True)
class Memory:
    """The peak of one call.

    Fields:
        peak_bytes: tensor bytes at the worst moment, above those at the start of the call.
        method: how it was found; a figure without its method is no figure.
        reserved_bytes: CUDA only: what the caching allocator held of the device at the peak, fragmentation included,
            counted from zero.
        largest_bytes: CPU only: the largest single allocation, which tells an L x L tensor from many small ones.
    """

    peak_bytes: int
    method: str
    reserved_bytes: int | None = None
    largest_bytes: int | None = None


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> Memory:
    """Run `call` once and report its peak. The call runs up to several times slower than unobserved: time it apart.

    Args:
        call: takes nothing; what it returns is released before the figure is final, and does count until then.
        device: where the tensors of the call live.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak(call, torch.device(device))
    # The autograd profiler is what torch.profiler wraps; used bare it spares 1.4 s of imports in every cell.
    with _without_its_notes(), profiler.profile(use_device=None, profile_memory=True) as profile:
        call()
    results: Any = profile.kineto_results
    assert results is not None
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    largest = max((change for _, change in events), default=0)
    return Memory(highest_sum(events), CPU_METHOD, largest_bytes=largest)


@contextmanager
def _without_its_notes() -> Iterator[None]:
    """The profiler writes lines of its own to standard error, at whatever log level: that it starts and stops, and that
    it does not know the size of what was there before. What else is written there meanwhile comes after."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            said.seek(0)
            rest = b"".join(line for line in said if not any(note in line for note in _NOTES))
            if rest:
                os.write(2, rest)


def highest_sum(events: Iterable[tuple[int, int]]) -> int:
    """Highest running sum of (time, change in bytes), at least 0. Events of one moment keep their order."""
    running = highest = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        running += change
        highest = max(highest, running)
    return highest


def _cuda_peak(call: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - start
    return Memory(peak, CUDA_METHOD, torch.cuda.max_memory_reserved(device))


class ResidentPeak:
    """How far the resident set of this process grew above what it was at the start.

    meter = ResidentPeak()
    call()
    meter.bytes()  # None where the system does not tell
    """

    def __init__(self) -> None:
        # What was freed goes back to the system first: filled again it would not count.
        gc.collect()
        _trim()
        self._start: int | None = None
        reset = Path("/proc/self/clear_refs")
        if reset.is_file():
            reset.write_text("5")  # the highest so far becomes what it is now
            self._start = _status()["VmRSS"]

    def bytes(self) -> int | None:
        return None if self._start is None else max(0, _status()["VmHWM"] - self._start)


def _trim() -> None:
    """Ask glibc to hand back what it holds; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def data_bytes() -> int | None:
    """Private writable memory of this process, which RLIMIT_DATA limits; None outside of Linux."""
    fields = _status()
    return fields["VmData"] if fields else None


def default_limit(device: str | torch.device = "cpu") -> int | None:
    """Bytes that a cell may take when nobody says: nine tenths of what is free now; None where unknown."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(kind)[0])
    free = _kibibytes(Path("/proc/meminfo")).get("MemAvailable")
    return None if free is None else int(0.9 * free)


def _status() -> dict[str, int]:
    return _kibibytes(Path("/proc/self/status"))


def _kibibytes(listing: Path) -> dict[str, int]:
    """The fields of a /proc listing that are given in kB, in bytes; empty where there is no such file."""
    if not listing.is_file():
        return {}
    parts = (line.split() for line in listing.read_text().splitlines())
    return {part[0].rstrip(":"): int(part[1]) * 1024 for part in parts if len(part) == 3 and part[2] == "kB"}
