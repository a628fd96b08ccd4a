"""However a command ends, it costs one line to read and an exit code that a script can act on.

0 all well; 1 something went wrong on the way or was recorded as failed; 2 the command line or the config was refused;
75 a scheduler stopped it with everything saved, or another process of the same training was lost: the same command goes
on; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attention_zoo import stopping, words
from attention_zoo.commands.refusals import missing_package, of_hydra

OK, FAILED, REFUSED = 0, 1, 2
DEBUG = "HYDRA_FULL_ERROR"
"""Set to 1 in the environment it shows the traceback of every error, Hydra's and ours alike."""


def launch(work: Callable[[], Any], again: str = "the same command") -> int:
    """Do the work of a command; returns its exit code.

    Args:
        work: returns an exit code, or None for 0. An exception of it is told in one line on standard error.
        again: what goes on where this was stopped.
    """
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding does not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals(), _plain_warnings():
            code = work()
            sys.stdout.flush()
    except KeyboardInterrupt as asked:
        stop = asked if isinstance(asked, stopping.Stopped) else stopping.Stopped()
        if _speaks():
            say(f"{stop}; what is finished is kept, and this goes on from there: {again}")
        return stop.code
    except SystemExit as ended:  # the parsers of others end so, having told why
        if isinstance(ended.code, str):
            say(f"error: {ended.code}")
            return FAILED
        return ended.code or OK
    except BrokenPipeError as error:
        if not _nobody_reads():
            return told(error)
        return FAILED
    except Exception as error:
        return told(error)
    return OK if code is None else int(code)


def _speaks() -> bool:
    """Whether this process tells what all of a run have to tell."""
    from attention_zoo.parallel.launched import launched

    try:
        return launched().first
    except ValueError:
        return True


@contextmanager
def _signals() -> Iterator[None]:
    """Signals end the work as `Stopped`; whoever called the command from Python has their own back after it."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.install()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that was not set from Python cannot be set back from it
                    signal.signal(number, handler)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A warning is one line that says it, without the place in the code that it came from."""
    before = warnings.showwarning
    warnings.showwarning = lambda message, *place, **more: say(f"warning: {message}")
    try:
        yield
    finally:
        warnings.showwarning = before


def told(error: BaseException) -> int:
    """Tell how a command failed, in one line; returns the exit code that belongs to it."""
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error)
    code, line = ending(error)
    say(f"error: {line}")
    return code


def say(line: str) -> None:
    """One line on standard error, whatever the text holds."""
    words.say(" ".join(line.split()))


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code that an exception stands for, and what to say of it."""
    from attention_zoo.measure.ends import ran_out_of_memory, was_refused

    if (line := of_hydra(error)) is not None:
        return REFUSED, line
    text = str(error) or type(error).__name__
    code = REFUSED if was_refused(error) else FAILED
    if isinstance(error, ImportError):
        return code, missing_package(error)
    if isinstance(error, ValueError):
        return code, text
    if isinstance(error, OSError):
        return code, _of_system(error)
    if ran_out_of_memory(error):
        return FAILED, f"out of memory: {text.splitlines()[0]}"
    return FAILED, f"{type(error).__name__}: {text[:500]} ({DEBUG}=1 shows where)"


def _of_system(error: OSError) -> str:
    """Which file, and what is wrong with it."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' to '.join(names)}: {error.strerror}" if names else error.strerror


def _nobody_reads() -> bool:
    """Whether it is our own output that is closed (`... | head`). It then goes nowhere, which is no error to tell."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
