"""Words to people on standard error: what they tell of goes on, whether or not anybody can hear them."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress

GONE = (errno.EPIPE, errno.EIO)
"""Whoever read it has ended (`2>&1 | head`), or its terminal was closed: nobody will ever hear."""


def say(line: str) -> None:
    """One line. Where it cannot be written it is not said, which ends nothing."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno in GONE:
            silence()
    except ValueError:  # it was closed
        pass


def silence() -> None:
    """From now on standard error goes nowhere: what lies in its buffer would fail again at the end of the process."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
