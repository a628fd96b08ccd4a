"""The side of a process that imports and forks, and of what it forks.

A child ends with its parent, after its time, and takes along whatever it has started itself.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from attention_zoo.measure.link import Link
from attention_zoo.stopping import SIGNALS, die_with_parent

LONGEST_S = 1e8
"""More than any timer needs, and all can hold."""
STEP_S = 0.01


def link_to_parent() -> Link:
    """To the process that started this one by `servers.Server`. Being asked to stop is the parent's to deal with: who
    asks all processes at once, as schedulers do, would else take the children's time to save from them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return Link(socket.socket(fileno=int(sys.argv[1])))


def fork(work: Callable[[], object], *, log: int, seconds: float | None = None, close: Sequence[int] = ()) -> int:
    """Start a child that does `work` and ends with code 0, or 1 if it raised; returns its process id.

    Args:
        log: descriptor that gets what it prints and its traceback.
        seconds: then the child ends by SIGALRM, whatever it does and whatever became of its parents.
        close: descriptors that are none of its business.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # a group, so that what it starts can be ended with it
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(parent)
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST_S))
        silence = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, silence), (1, log), (2, log)):
            os.dup2(source, target)
        for each in close:
            os.close(each)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # never back into the loop
    raise AssertionError("unreachable")


def end_of(child: int, within_s: float | None = None) -> int:
    """Wait for a child, and end what it leaves behind; returns its exit code, or minus the signal.

    Args:
        within_s: then it is killed.
    """
    flags = os.WEXITED | os.WNOWAIT  # not reaped yet: its number is still its own
    if within_s is not None:
        until = time.monotonic() + within_s
        while os.waitid(os.P_PID, child, flags | os.WNOHANG) is None and time.monotonic() < until:
            time.sleep(STEP_S)
        kill_group(child)
    os.waitid(os.P_PID, child, flags)
    kill_group(child)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_group(child: int) -> None:
    """End a forked child and what it has started. Nothing happens where nobody is left."""
    for kill in (os.killpg, os.kill):  # it may not have its group yet
        with suppress(ProcessLookupError, PermissionError):  # macOS: no permission to signal what is dead already
            kill(child, signal.SIGKILL)
