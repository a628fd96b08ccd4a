"""The process in which W&B runs, seen from the run that it follows: started, written to, read from, and ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOREIGN = ("WANDB_SERVICE",)
"""Set where a W&B process of somebody else is running: ours is our own, since it may have to be ended."""
MISLEADING = ("WANDB_MODE", "WANDB_BASE_URL")
"""Not for a process that goes on offline: one of these may be why."""


_parked: list[Beside] = []


def park(process: Beside) -> None:
    """Leave a process that waits for its next run to whoever begins one; it ends with this process at the latest."""
    _parked.append(process)


def parked() -> Beside | None:
    """A process that waits for its next run, if one does."""
    return _parked.pop() if _parked else None


@atexit.register
def end_parked() -> None:
    """End what nobody took."""
    while _parked:
        _parked.pop().end(0.0)


class Beside:
    """A running wandb_process.py, with everything that it starts.

    Args:
        mode: of its runs: "auto", "online" or "offline".
    """

    def __init__(self, mode: str):
        self.mode = mode
        drop = MISLEADING if mode == "offline" else ()
        env = {name: value for name, value in os.environ.items() if name not in (*FOREIGN, *drop)}
        env.setdefault("WANDB_PROGRAM", sys.argv[0] or "python")
        script = Path(__file__).with_name("wandb_process.py")
        # -P: this folder has a wandb.py of its own. A session of its own: Ctrl-C is for the run, one kill for them all
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, start_new_session=True,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._over = threading.Event()
        threading.Thread(target=self._read, daemon=True, name="wandb answers").start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.endswith(b"\n"):  # else it died over it
                self._answers.put(json.loads(text))
        self._process.stdout.close()
        self._answers.put({"problem": "has ended", "over": True})
        self._over.set()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; waits where it is not read."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(message) + "\n").encode())
        self._process.stdin.flush()

    def answer(self, wait_s: float | None) -> dict[str, Any]:
        """The next answer; an empty one where none comes in time. None waits for good."""
        try:
            return self._answers.get(block=wait_s != 0, timeout=wait_s)
        except queue.Empty:
            return {}

    def end(self, wait_s: float) -> None:
        """Let it end by itself for a while; whatever is left of it then ends now."""
        if self._process.returncode is not None:
            return
        self._over.wait(wait_s)
        with contextlib.suppress(ProcessLookupError):  # all gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was not sent has nobody to go to
            self._process.stdin.close()
