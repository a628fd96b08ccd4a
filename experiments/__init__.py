"""Thin entry points: python -m experiments.<name> --help."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def start(name: str) -> None:
    """Run a command as this process, which ends with its exit code."""
    for known in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, known, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from attention_zoo.commands.main import main

    sys.exit(main([name, *sys.argv[1:]], program=f"python -m experiments.{name}"))


def _end(number: int, _frame: FrameType | None) -> None:
    """Asked to stop while torch is loading, which takes seconds: nothing was begun, and no library is to catch this."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    os.write(2, f"stopped by {by}\n".encode())
    os._exit(130 if number == signal.SIGINT else 75)
