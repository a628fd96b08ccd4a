"""A command as a process of its own. Installed beside the package, as `attention_zoo_start`: importing the package
brings torch, which takes seconds, and who stops a command on the way shall read one line, too."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def start(words: list[str] | None = None, program: str | None = None) -> None:
    """Run a command as this process, which ends with its exit code.

    Args:
        words: of the command line, the command first; default those of this process.
        program: how the command was called; default attention-zoo and its name.
    """
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torch would warn on each process that it looks for weights without a gradient, which is meant
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from attention_zoo.commands.main import main

    atexit.register(_through)
    sys.exit(main(words, program))


def _end(number: int, _frame: FrameType | None) -> None:
    """Asked to stop while torch is loading: nothing was begun, and no library is to catch this."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    os.write(2, f"stopped by {by}\n".encode())
    os._exit(130 if number == signal.SIGINT else 75)


def _through() -> None:
    """All is done and written: who asks to stop now gets the exit code of the work. An interpreter that ends would
    otherwise give each signal back its default, which is to die by it."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
