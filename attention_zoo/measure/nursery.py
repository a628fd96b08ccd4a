"""Fresh processes for cells, one at a time: what each came to, whatever happened to it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from attention_zoo.measure.cell import SpeedCell, blank_row

CALM = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Threads that wait sleep soon, unless the user says otherwise. On two cores, Longformer at 4,096 tokens: sleeping at
once took 1.9 times as long as spinning for long (a mechanism is many small operations), this 1.1 times; beside other
work spinning for long took up to 7 times as long, this 1.4 times."""


def server_environment(here: bool = True) -> dict[str, str]:
    """Of a process that imports and forks.

    Args:
        here: it imports what this process imports, whether installed, in the working directory or on the path. Another
            Python has libraries of its own, and nothing but this package is handed to it.
    """
    package = str(Path(str(resources.files("attention_zoo"))).parent)
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path) if here else package
    # One OpenBLAS thread: numpy's pool would start at import, and threads do not survive a fork.
    calm = {} if CALM.keys() & os.environ.keys() else CALM
    return {**calm, **os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}


class Nursery:
    """Starts `measure.worker` when the first cell comes, and ends it at the end of the context.

    with Nursery() as nursery:
        row = nursery.run(cell, timeout_s=60, memory_limit_bytes=2**30, repeats=5, budget_s=4.0)
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="attention_zoo.")

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, cell: SpeedCell, *, timeout_s: float, **how: Any) -> dict[str, Any]:
        """The row of one cell, measured in a process of its own.

        Args:
            timeout_s: then the process is killed and the row says "timeout".
            how: memory_limit_bytes, and what `run_cell` takes.
        """
        answer, complaint = (Path(self._folder.name) / name for name in ("row.json", "stderr.txt"))
        answer.unlink(missing_ok=True)
        complaint.write_text("")
        self._start()
        self._send({"cell": asdict(cell), "answer": str(answer), "complaint": str(complaint), **how})
        child = self._read()["pid"]
        try:
            late = not self._wait(timeout_s)
        finally:
            # Also when we are interrupted: nobody else would end it. After a regular end nothing is there to kill.
            if not self._wait(0):
                os.kill(child, signal.SIGKILL)
        code = self._read()["exit"]
        if late:
            return blank_row(cell, "timeout", f"not through within {timeout_s:g} s")
        if code == 0:
            return json.loads(answer.read_text())
        return blank_row(cell, *_how_it_died(code, complaint.read_text(errors="replace")))

    def _start(self) -> None:
        if self._server is not None:
            return
        self._server = subprocess.Popen(
            [sys.executable, "-m", "attention_zoo.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=server_environment(),
        )
        self._read()

    def _stop(self) -> None:
        if self._server is None:
            return
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()
        self._server = None

    def _send(self, request: dict[str, Any]) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        self._server.stdin.write((json.dumps(request, allow_nan=False) + "\n").encode())

    def _read(self) -> dict[str, Any]:
        assert self._server is not None
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended by itself with exit code {self._server.wait()}")
        return json.loads(line)

    def _wait(self, seconds: float) -> bool:
        """Whether the worker says something within that time."""
        assert self._server is not None
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], seconds)[0])


def _how_it_died(code: int, complaint: str) -> tuple[str, str]:
    """Status and reason of a process that gave no row."""
    if code == -signal.SIGKILL:
        return "oom", "killed from outside (signal 9), which is how Linux ends a process when memory runs out"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it said nothing"
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}: {last}"
    return "failed", f"exit code {code}: {last}"
