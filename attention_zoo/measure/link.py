"""A conversation between a process and the one that it started: lines of JSON over a socket of their own.

Not over stdin and stdout: what a library prints while it is imported must not get into it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any


class Nonsense(Exception):
    """What came is no line of JSON."""


class Link:
    """One end.

    Args:
        channel: connected; owned from now on.
    """

    def __init__(self, channel: socket.socket):
        self._channel = channel
        self._come = b""
        self._files: list[int] = []

    def fileno(self) -> int:
        return self._channel.fileno()

    def say(self, what: Any, files: Sequence[int] = ()) -> bool:
        """Whether it could be sent: the other end may be gone.

        Args:
            files: descriptors that the other end gets its own copies of, see `take_files`.
        """
        line = json.dumps(what).encode() + b"\n"
        try:
            if files:
                sent = socket.send_fds(self._channel, [line], list(files))
                line = line[sent:]
            self._channel.settimeout(None)
            self._channel.sendall(line)
        except OSError:
            return False
        return True

    def hear(self, timeout_s: float | None = None) -> Any:
        """The next line; None when there will be none.

        Raises:
            TimeoutError: when none came within so many seconds.
            Nonsense: for what is no JSON.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._come:
            self._channel.settimeout(None if until is None else max(1e-3, until - time.monotonic()))
            try:
                data, files, *_ = socket.recv_fds(self._channel, 2**16, 4)
            except TimeoutError:
                raise
            except OSError:  # the other end is gone, or this one is closed
                data, files = b"", []
            self._files += files
            if not data:
                return None
            self._come += data
        line, _, self._come = self._come.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Nonsense(f"no line of JSON: {line[:80]!r}") from None

    def take_files(self) -> list[int]:
        """The descriptors that came, in order; whoever takes them closes them."""
        files, self._files = self._files, []
        return files

    def close(self) -> None:
        for each in self.take_files():
            os.close(each)
        self._channel.close()
