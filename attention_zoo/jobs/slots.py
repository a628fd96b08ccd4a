"""Fresh processes for trainings, several at a time: each is forked from one that has imported everything already.

Imports take three seconds of a processor, as long as a small training's steps; here each slot pays for them once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from attention_zoo.measure.forked import kill_group
from attention_zoo.measure.servers import Gone, Server

STEP_S = 0.05


class Slots:
    """Where processes are started; all end with the context.

    with Slots() as slots:
        process = slots.start("module:name", {"argument": 1}, log=descriptor)
    """

    def __init__(self) -> None:
        self._free: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._free:
            with suppress(Gone):
                self._free.pop().close()

    def start(self, function: str, given: Mapping[str, Any], log: int) -> Process:
        """Have a function called in a process of its own, which ends with code 0, or 1 if it raised.

        Args:
            function: "module:name", whose module may say by `FIRST` and `prepare` what is imported and done before, and
                by `share` what is made of `given` for all calls.
            given: its keyword arguments, plain.
            log: descriptor that gets what it prints, and its traceback.

        Raises:
            Gone: where none can be started.
        """
        asked = {"function": function, "given": dict(given), "seconds": None}
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what it returns is not asked for
        try:
            while self._free:
                with suppress(Gone):  # it died between two calls, which is none of this one's business
                    return self._forked(self._free.pop(), asked, nowhere, log)
            return self._forked(Server("attention_zoo.measure.worker"), asked, nowhere, log)
        finally:
            os.close(nowhere)

    def _forked(self, server: Server, asked: dict[str, Any], *files: int) -> Process:
        try:
            return Process(server, server.ask(asked, files)["pid"], self._free)
        except Gone:
            server.kill()
            raise


class Process:
    """One of them, with the names of `subprocess.Popen`.

    Args:
        server: that it was forked from, and that tells its end.
        free: where the server goes then.
    """

    def __init__(self, server: Server, pid: int, free: list[Server]):
        self.pid, self.returncode = pid, None
        self._server, self._free = server, free

    returncode: int | None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            with suppress(TimeoutError):
                try:
                    self.returncode = self._server.hear(0.0)["exit"]
                    self._free.append(self._server)
                except Gone:  # killed from outside, and its child with it
                    self._server.kill()
                    self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, when it has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not within so many seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired("a training", timeout or 0.0)
            time.sleep(STEP_S)
        return code

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, with what it has started."""
        if self.poll() is None:
            kill_group(self.pid)


class NeverBegun:
    """In the place of a process that could not be started: why stands in its log."""

    pid, returncode = 0, 1

    def poll(self) -> int:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def kill(self) -> None: ...
