"""Fresh processes for cells, one at a time: what each came to, whatever happened to it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, cast

from attention_zoo.measure.cell import SpeedCell, blank_row
from attention_zoo.measure.ends import Ended, how_it_ended, oom_kills
from attention_zoo.measure.forked import kill_group
from attention_zoo.measure.memory import default_limit
from attention_zoo.measure.servers import Gone, Scratch, Server
from attention_zoo.results.row import SpeedRow

GRACE_S = 5.0
"""After its time a process ends by itself; this long after it, it is ended."""
LOOK_S = 0.1
WIDER = 1.1
"""A limit read off free memory wanders; so much more is another one."""


class Nursery:
    """Starts `measure.worker` when the first cell comes, and ends it at the end of the context.

    with Nursery() as nursery:
        row = nursery.run(cell, timeout_s=60, memory_limit_bytes=2**30, repeats=5, budget_s=4.0)

    A worker that dies costs the row of its cell alone: the next one gets another worker.
    """

    def __init__(self) -> None:
        self._server: Server | None = None
        self._answer, self._complaint = Scratch(), Scratch()

    @property
    def started(self) -> bool:
        """Whether a process is there that the next call is forked from."""
        return self._server is not None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._server is not None:
            # asked to stop, nobody has the time to wait for it
            self._server.close() if error is None else self._server.kill()
            self._server = None
        self._answer.close()
        self._complaint.close()

    def run(self, cell: SpeedCell, *, timeout_s: float, memory_limit_bytes: int | None = None, **how: Any) -> SpeedRow:
        """The row of one cell, measured in a process of its own.

        Args:
            timeout_s: then the process is ended and the row says "timeout"; infinity: never.
            memory_limit_bytes, how: what `run_cell` takes.
        """
        row = self._measured(cell, timeout_s, memory_limit_bytes=memory_limit_bytes, **how)
        if row["status"] != "failed" or memory_limit_bytes is None:
            return row
        # Libraries fail in strange ways when memory is refused to them: whether it was that, a wider limit tells.
        wide = default_limit(cell.device)
        if wide is None or wide <= WIDER * memory_limit_bytes:
            return row
        once = {**how, "repeats": 1, "budget_s": 0.0, "observe": False, "trace": None}
        if self._measured(cell, timeout_s, memory_limit_bytes=wide, **once)["status"] not in ("ok", "oom"):
            return row
        limit = f"{memory_limit_bytes / 2**20:,.1f} MiB"
        return {**row, "status": "oom", "error": f"not within {limit}, though with more: {row['error']}"}

    def _measured(self, cell: SpeedCell, timeout_s: float, **how: Any) -> SpeedRow:
        given = {"cell": asdict(cell), **how}
        found = self.call("attention_zoo.measure.cell:run_described", given, timeout_s=timeout_s)
        return blank_row(cell, *found) if isinstance(found, Ended) else cast(SpeedRow, found)

    def call(
        self, function: str, given: dict[str, Any], *, timeout_s: float, look: Callable[[], None] | None = None,
        leave_s: float = 0.0,
    ) -> dict[str, Any] | Ended:  # fmt: skip
        """What a function returns in a fresh process, or how that ended.

        Args:
            function: "module:name"; returns a mapping that `files.plain` can hold.
            given: its keyword arguments, plain.
            timeout_s: then the process is ended; infinity: never.
            look: called a few times a second meanwhile; what it raises ends the process, and is raised again.
            leave_s: what a process that is no longer wanted may take from its SIGTERM to its end.
        """
        asked = {"function": function, "given": given, "seconds": None if timeout_s == float("inf") else timeout_s}
        kills = oom_kills()
        try:
            server, child = self._begin(asked)
        except Gone:  # it died between two calls, which is none of this one's business
            try:
                server, child = self._begin(asked)
            except Gone as gone:
                return gone.ended
        started = time.monotonic()
        try:
            code = _heard(server, timeout_s + GRACE_S, look)["exit"]
        except TimeoutError:  # it does not end by itself
            code = -signal.SIGALRM
            self._discard(child)
        except Gone as gone:
            self._discard(child)
            return gone.ended
        except BaseException:  # interrupted: nobody else would end what the child has started
            try:
                if leave_s:
                    _leave(server, child, leave_s)
            finally:
                self._discard(child)
            raise
        if code == -signal.SIGALRM and time.monotonic() - started > 0.9 * timeout_s:
            return Ended("timeout", f"not through within {timeout_s:g} s")
        return self._result(code, oom_kills() > kills)

    def _begin(self, asked: dict[str, Any]) -> tuple[Server, int]:
        """Have a child started; returns its parent and its process id."""
        self._answer.clear()
        self._complaint.clear()
        if self._server is None:
            self._server = Server("attention_zoo.measure.worker")
        try:
            said = self._server.ask(asked, (self._answer.descriptor, self._complaint.descriptor))
        except Gone:
            self._discard()
            raise
        return self._server, said["pid"]

    def _result(self, code: int, killed_for_memory: bool) -> dict[str, Any] | Ended:
        if code == 0:
            try:
                row = json.loads(self._answer.all().rpartition(b"\n")[2])
            except ValueError:  # it ended before it had written, or somebody else wrote
                row = None
            if isinstance(row, dict):
                return row
        return how_it_ended(code, self._complaint.end().decode(errors="replace"), killed_for_memory=killed_for_memory)

    def _discard(self, child: int | None = None) -> None:
        """End the worker, which will not be asked again, and its child with all that this has started."""
        if child is not None:
            kill_group(child)
        if self._server is not None:
            self._server.kill()
            self._server = None


def _heard(server: Server, timeout_s: float, look: Callable[[], None] | None) -> dict[str, Any]:
    """The next thing that a server says, looking around while it says nothing."""
    if look is None:
        return server.hear(timeout_s)
    until = time.monotonic() + timeout_s
    while True:
        look()
        try:
            return server.hear(min(LOOK_S, max(0.0, until - time.monotonic())))
        except TimeoutError:
            if time.monotonic() >= until:
                raise


def _leave(server: Server, child: int, leave_s: float) -> None:
    """Ask a child to end, and wait until it has."""
    with suppress(ProcessLookupError, TimeoutError, Gone):
        os.kill(child, signal.SIGTERM)
        server.hear(leave_s)
