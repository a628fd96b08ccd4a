"""Being asked to stop: signals as one exception, loops that end well, children that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
REQUEUE = 75
"""Exit code of a command that a scheduler has stopped, with everything saved (EX_TEMPFAIL of sysexits.h)."""
CTRL_C = 130
"""Exit code of a command that Ctrl-C has stopped."""
_WATCH_S = 1.0

_asked: signal.Signals | None = None
_graceful = 0


class Stopped(KeyboardInterrupt):
    """Asked from outside to stop. A KeyboardInterrupt, so that nothing takes it for an error of the work itself.

    Args:
        by: the signal.
    """

    def __init__(self, by: signal.Signals = signal.SIGINT):
        super().__init__(by)
        self.signal = by

    def __str__(self) -> str:
        return "stopped by Ctrl-C" if self.signal == signal.SIGINT else f"stopped by {self.signal.name}"

    @property
    def code(self) -> int:
        """The exit code that tells launchers what happened."""
        return CTRL_C if self.signal == signal.SIGINT else REQUEUE


def install() -> None:
    """From now on each of `SIGNALS` raises `Stopped` in the main thread; nothing is changed outside of that thread.

    A signal that is ignored (nohup, a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


@contextmanager
def beside() -> Iterator[None]:
    """A stretch in a process of somebody else's in which signals raise `Stopped`: first comes the handler that was
    there, which may raise something of its own to requeue the job. Nothing is changed outside of the main thread."""
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if callable(before[number]):
            before[number](number, frame)
        raise Stopped(signal.Signals(number))

    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in SIGNALS}
        before = {each: found for each, found in before.items() if found not in (None, signal.SIG_IGN)}
    for each in before:
        signal.signal(each, on_signal)
    try:
        yield
    finally:
        for each, found in before.items():
            signal.signal(each, found)


@contextmanager
def ctrl_c_here_alone() -> Iterator[None]:
    """A stretch in which processes that this thread starts never hear of a terminal's Ctrl-C, which comes to all of a
    terminal's. Another thread must be there that hears of it for this process."""
    masked = getattr(signal, "pthread_sigmask", None)
    before = masked(signal.SIG_BLOCK, [signal.SIGINT]) if masked else None
    try:
        yield
    finally:
        if masked:
            masked(signal.SIG_SETMASK, before)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _asked
    by = signal.Signals(number)
    if _graceful and _asked is None:
        _asked = by
        return
    raise Stopped(by)


@contextmanager
def graceful() -> Iterator[Callable[[], signal.Signals | None]]:
    """A stretch that ends at a place of its own choice: the first signal is only noted, a second one raises at once.

    Yields:
        a function that tells which signal has come, or None. The loop asks it, saves, and raises `Stopped(signal)`;
        one that does not ask in time is stopped when the stretch ends.
    """
    global _asked, _graceful
    _graceful += 1
    try:
        yield lambda: _asked
    except Exception as error:
        if _asked is not None:  # who asked comes first: what failed will fail again when the work goes on
            raise Stopped(_asked) from error
        raise
    else:
        if _asked is not None:
            raise Stopped(_asked)
    finally:
        _graceful -= 1
        if not _graceful:
            _asked = None


def die_with_parent(parent: int) -> None:
    """End this process when the one that started it ends, however that ends. Call it first thing in a child.

    By the kernel where it can (Linux), elsewhere by a thread that looks whether the parent is still the same.

    Args:
        parent: process id of the one that started this one from its main thread; if it is gone already, so is this.
    """
    if not _ended_by_kernel():

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(_WATCH_S)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True, name="die with parent").start()
    elif os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _ended_by_kernel() -> bool:
    # no thread where none is needed: some of these processes fork
    PR_SET_PDEATHSIG = 1
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None) if sys.platform == "linux" else None
    return prctl is not None and prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0


def child_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """What `python -m module` does, as a child that ends with this process from its first moment on.

    Args:
        module: run as `__main__`.
        arguments: its `sys.argv[1:]`.
        python: by whom it is run.
    """
    # this file needs nothing but the standard library: importing the package takes seconds, which a parent may not have
    first = (
        "import runpy, sys; _, here, parent, module, *rest = sys.argv; "
        "runpy.run_path(here)['die_with_parent'](int(parent)); "
        "sys.argv[1:] = rest; runpy.run_module(module, run_name='__main__', alter_sys=True)"
    )
    return [python, "-c", first, __file__, str(os.getpid()), module, *arguments]
