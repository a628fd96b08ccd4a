"""One side of a comparison in a process of its own: asked for a call, it makes one and says how long that took."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.ends import how_it_ended, oom_kills
from attention_zoo.measure.forked import kill_group
from attention_zoo.measure.link import Link, Nonsense
from attention_zoo.measure.nursery import GRACE_S
from attention_zoo.measure.peers.table import PEERS
from attention_zoo.measure.servers import Gone, Scratch, Server
from attention_zoo.results.row import Status


class Lost(Exception):
    """A contender is gone: its status, and why."""

    def __init__(self, status: Status, reason: str):
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
        self._servers: dict[str, Server] = {}

    def __enter__(self) -> Stable:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self._servers.values():
            # asked to stop, nobody has the time to wait for it
            server.close() if error is None else server.kill()
        self._servers = {}

    def start(self, cell: SpeedCell, peer: str | None, role: str, *, timeout_s: float) -> Contender:
        """A contender, see `server._contend`; peer None is our side.

        Args:
            timeout_s: of each of its answers; infinity: as long as it takes.

        Raises:
            Lost: if there is no process to start it.
        """
        python = self._pythons.get(peer or "", sys.executable)
        what = {"cell": asdict(cell), "peer": peer, "role": role, "memory_limit_bytes": self._limit}
        asked = {"fork": {**what, "timeout_s": None if math.isinf(timeout_s) else timeout_s}}
        ours, theirs = socket.socketpair()
        log, kills = Scratch(), oom_kills()
        try:
            with theirs:
                server, pid = self._begin(python, asked, (theirs.fileno(), log.descriptor))
        except BaseException:
            ours.close()
            log.close()
            raise
        return Contender(server, pid, Link(ours), log, kills, timeout_s)

    def _begin(self, python: str, asked: dict[str, Any], files: tuple[int, int]) -> tuple[Server, int]:
        for again in (True, False):
            server = self._servers.get(python)
            try:
                if server is None:
                    server = self._servers[python] = Server("attention_zoo.measure.peers.server", python)
                return server, server.ask(asked, files)["pid"]
            except Gone as gone:
                started = self._servers.pop(python, None)
                if started is not None:
                    started.kill()
                    if again:  # it died between two questions: another one is asked
                        continue
                elif python != sys.executable:
                    raise Lost("missing", f"{python} cannot run attention_zoo: {gone.ended.reason}") from None
                raise Lost(*gone.ended) from None
        raise AssertionError("unreachable")


class Contender:
    """Made by `Stable.start`."""

    def __init__(self, server: Server, pid: int, link: Link, log: Scratch, kills: int, timeout_s: float):
        self._server, self._pid, self._link, self._log, self._kills = server, pid, link, log, kills
        self._timeout_s = timeout_s
        self._over = False

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(Gone):  # then it is gone, too
            self.close(kill=error is not None)

    def ask(self, what: str | None = None) -> dict[str, Any]:
        """Say something (or nothing) and wait for what comes.

        Raises:
            Lost: with the status and the reason, when it could not, or is no more.
        """
        asked = time.monotonic()
        if what is not None:
            self._link.say(what)
        try:
            answer = self._link.hear(None if math.isinf(self._timeout_s) else self._timeout_s + GRACE_S)
        except TimeoutError:  # it did not end by itself
            raise self._lost(asked, kill=True) from None
        except Nonsense:
            answer = None
        if not isinstance(answer, dict):
            raise self._lost(asked)
        if answer["status"] != "ok":
            with suppress(Gone):
                self.close()
            raise Lost(answer["status"], answer["error"])
        return answer

    def _lost(self, asked: float, *, kill: bool = False) -> Lost:
        try:
            code = self.close(kill=kill)
        except Gone as gone:
            return Lost(*gone.ended)
        if kill or (code == -signal.SIGALRM and time.monotonic() - asked > 0.9 * self._timeout_s):
            return Lost("timeout", f"not through within {self._timeout_s:g} s")
        return Lost(*how_it_ended(code, self._said, killed_for_memory=oom_kills() > self._kills))

    def close(self, *, kill: bool = False) -> int:
        """End it; returns its exit code, or minus the signal.

        Raises:
            Gone: if its server is, and with it the contender.
        """
        if self._over:
            return 0
        self._over = True
        if kill:
            kill_group(self._pid)
        # the channel first: a contender that waits for a word ends when none can come
        self._link.close()
        try:
            code: int = self._server.ask({"wait": self._pid})["exit"]
        finally:
            self._said = self._log.end().decode(errors="replace")
            self._log.close()
        return code
