"""One side of a comparison in a process of its own: asked for a call, it makes one and says how long that took."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.nursery import server_environment
from attention_zoo.measure.peers.table import PEERS


class Lost(Exception):
    """A contender is gone: its status, and why."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Stable:
    """Where contenders come from: one server for each Python that is asked for, started when it is needed.

    with Stable({"hf_bigbird_4_57": "/elsewhere/bin/python"}) as stable:
        with stable.start(cell, "hf_longformer", "time", timeout_s=60) as contender:
            contender.ask("call")["seconds"]
    """

    def __init__(self, pythons: dict[str, str] | None = None, memory_limit_bytes: int | None = None):
        self._pythons, self._limit = dict(pythons or {}), memory_limit_bytes
        for peer, path in self._pythons.items():
            if peer not in PEERS:
                raise ValueError(f"peer_python must name a peer ({', '.join(PEERS)}), got {peer!r}")
            if not os.access(path, os.X_OK):
                raise ValueError(f"peer_python.{peer} must be the path of a Python, got {path!r}")
        self._servers: dict[str, subprocess.Popen[str]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="attention_zoo.")
        self._count = 0

    def __enter__(self) -> Stable:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self._servers.values():
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.close()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            server.stdout.close()
        self._folder.cleanup()

    def start(self, cell: SpeedCell, peer: str | None, role: str, *, timeout_s: float) -> Contender:
        """A contender, see `server._contend`; peer None is our side."""
        python = self._pythons.get(peer or "", sys.executable)
        self._count += 1
        path = str(Path(self._folder.name) / f"{self._count}")
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path)
            door.listen(1)
            what = {"cell": asdict(cell), "peer": peer, "role": role, "memory_limit_bytes": self._limit}
            pid = self.tell(python, {"fork": what, "socket": path})["pid"]
            door.settimeout(timeout_s)
            try:
                channel, _ = door.accept()
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self.tell(python, {"wait": pid})
                raise Lost("timeout", f"no process within {timeout_s:g} s") from None
        return Contender(self, python, pid, channel, timeout_s)

    def tell(self, python: str, request: dict[str, Any]) -> dict[str, Any]:
        """Ask a server and read its answer."""
        server = self._servers.get(python) or self._serve(python)
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            line = server.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Lost("missing", f"{python} cannot run attention_zoo (exit code {server.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _serve(self, python: str) -> subprocess.Popen[str]:
        self._servers[python] = subprocess.Popen(
            [python, "-W", "ignore", "-m", "attention_zoo.measure.peers.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=server_environment(here=python == sys.executable),
        )
        return self._servers[python]


class Contender:
    """Made by `Stable.start`."""

    def __init__(self, stable: Stable, python: str, pid: int, channel: socket.socket, timeout_s: float):
        self._stable, self._python, self._pid = stable, python, pid
        self._channel, self._timeout_s = channel, timeout_s
        channel.settimeout(timeout_s)
        self._talk = channel.makefile("rw")
        self._over = False

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, what: str | None = None) -> dict[str, Any]:
        """Say something (or nothing) and wait for what comes.

        Raises:
            Lost: with the status and the reason, when it could not, or is no more.
        """
        try:
            if what is not None:
                self._talk.write(json.dumps(what) + "\n")
                self._talk.flush()
            line = self._talk.readline()
        except TimeoutError:
            self.close(kill=True)
            raise Lost("timeout", f"not through within {self._timeout_s:g} s") from None
        except ConnectionError:
            line = ""
        if not line:
            code = self.close()
            if code == -signal.SIGKILL:
                raise Lost("oom", "killed from outside (signal 9), which is how Linux ends what takes too much memory")
            raise Lost("failed", f"its process ended with exit code {code}")
        answer: dict[str, Any] = json.loads(line)
        if answer["status"] != "ok":
            self.close()
            raise Lost(answer["status"], answer["error"])
        return answer

    def close(self, *, kill: bool = False) -> int | None:
        """End it; returns its exit code at the first time."""
        if self._over:
            return None
        self._over = True
        if kill:
            os.kill(self._pid, signal.SIGKILL)
        # the channel first: a contender that waits for a word ends when none can come
        with suppress(TimeoutError, ConnectionError):  # what was not sent is not wanted any more
            self._talk.close()
        self._channel.close()
        code: int = self._stable.tell(self._python, {"wait": self._pid})["exit"]
        return code
