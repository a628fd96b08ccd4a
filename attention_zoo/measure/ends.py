"""How a process ended, in the words of rows.

"failed" is what it did itself, "oom" what was refused or ended for want of memory, "lost" what somebody else did to it:
a kill, a scheduler's limit. Only "lost" says nothing about the work, so that the next call does it again by itself.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attention_zoo.results.row import Status

STATUSES = ("ok", "unsupported", "oom", "oom_predicted", "timeout", "failed", "lost")
REPEATED = ("failed", "oom", "oom_predicted", "timeout")
"""Kept statuses that retry=failed repeats; a prediction is then made anew."""

OWN = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP", "SIGXFSZ", "SIGPIPE")
"""Signals that a process brings upon itself."""

REFUSED = (
    "can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED", "MemoryError",
)  # fmt: skip
"""What torch, CUDA's libraries, C++ and the system say when memory is refused."""

SAID = 300
"""Characters of somebody else's message that a row keeps."""


class Ended(NamedTuple):
    """Status and reason, in one line, of work that gave no result."""

    status: Status
    reason: str


def how_it_ended(code: int, complaint: str, *, killed_for_memory: bool = False) -> Ended:
    """Of a process that left no result.

    Args:
        code: its exit code, or minus the signal.
        complaint: what it printed.
        killed_for_memory: whether the kernel says so, see `oom_kills`.
    """
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    # what Python's own fault handler adds comes last and says nothing
    told = [line for line in lines if not line.startswith("Extension modules:")]
    last = told[-1][:SAID] if told else "it said nothing"
    if code == -signal.SIGKILL and killed_for_memory:
        return Ended("oom", "the kernel ended it for want of memory (its own counter, oom_kill, says so)")
    if code < 0 and (name := signal_name(-code)) not in OWN:
        return Ended("lost", f"ended from outside by {name}; the next call does it again")
    how = f"ended by {signal_name(-code)}" if code < 0 else f"exit code {code}"
    if code and any(sign in complaint for sign in REFUSED if sign != "out of memory"):
        return Ended("oom", f"{how}: {next(line for line in lines if any(sign in line for sign in REFUSED))[:SAID]}")
    return Ended("failed", f"{how} before there was a result: {last}" if code == 0 else f"{how}: {last}")


def signal_name(number: int) -> str:
    """ "SIGTERM"; "signal 40" for one that has no name."""
    return signal.Signals(number).name if number in {each.value for each in signal.Signals} else f"signal {number}"


def oom_kills() -> int:
    """How many processes of this control group the kernel has ended for want of memory; on Linux without one, of this
    machine; elsewhere 0."""
    counters = list(_counters()) or [Path("/proc/vmstat")]
    words = [line.split() for path in counters if path.is_file() for line in path.read_text().splitlines()]
    return sum(int(word[1]) for word in words if word[0] == "oom_kill")


def _counters() -> Iterator[Path]:
    listing = Path("/proc/self/cgroup")
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.events"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.oom_control"
        else:
            continue
        # in a container the path may be the host's, and the root what we are in
        yield from [path for folder in (root / inside.lstrip("/"), root) if (path := folder / name).is_file()][:1]


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory was refused: by CUDA, torch's CPU allocator, C++, Python or the system."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in REFUSED):
        return True
    return error.__cause__ is not None and ran_out_of_memory(error.__cause__)


NAMED = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the system says of a path that cannot be used; a full disk or a broken one comes later, and is no word of it."""


def was_refused(error: BaseException) -> bool:
    """Whether an exception, raised before there was any work to do, means that what was asked for cannot be meant."""
    return isinstance(error, (ValueError, ImportError, *NAMED))


def ending(error: BaseException) -> Ended:
    """Of work that ended in an exception."""
    status: Status = "oom" if ran_out_of_memory(error) else "failed"
    return Ended(status, f"{type(error).__name__}: {one_line(error)}")


def one_line(error: BaseException, most: int = SAID) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else "no message"


def is_kept(row: Mapping[str, Any], retry: str | None) -> bool:
    """Whether a row of an earlier call stands, as far as its status tells.

    Args:
        retry: None or "failed".
    """
    return row["status"] != "lost" and not (retry == "failed" and row["status"] in REPEATED)


def check_retry(retry: str | None) -> None:
    """Raise a ValueError for anything but None and "failed"."""
    if retry not in (None, "failed"):
        raise ValueError(f"retry must be null or failed, got {retry!r}")
