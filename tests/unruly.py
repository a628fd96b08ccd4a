"""A backend from elsewhere that misbehaves as told: installed on a path of its own, found by its entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = '''
import os, signal, subprocess, sys, time
import torch
from attention_zoo.attention.full import Full

print("noise at import")


class Unruly(Full):
    """Full attention that misbehaves as told."""

    name = "unruly"

    def __init__(self, *, mood: str = "good", **shared):
        super().__init__(**shared)
        self.mood = mood

    def forward(self, x, tokens=None, **rest):
        print("noise on stdout")
        os.write(1, b"and below it, no UTF-8: \\xff\\xfe\\xc3")
        getattr(self, self.mood, lambda: None)()
        return super().forward(x, tokens, **rest)

    def pause(self):
        time.sleep(0.3)

    def slow(self):
        time.sleep(60)

    def deaf(self):  # to the clock
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)

    def crash(self):
        os.abort()

    def segfault(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def exit(self):
        raise SystemExit(3)

    def leave(self):
        os._exit(0)

    def leave_loudly(self):
        os._exit(7)

    def killed(self):
        os.kill(os.getpid(), 9)

    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)

    def odd_signal(self):
        os.kill(os.getpid(), 40)

    def past_its_share(self):  # of CPU seconds, as a scheduler says it
        os.kill(os.getpid(), signal.SIGXCPU)

    def error(self):
        raise RuntimeError("boom\\nof two lines")

    def surrogate(self):
        raise ValueError("\\ud800 is no text")

    def greedy(self):
        torch.ones(2**28)  # 1 GiB

    def parricide(self):
        os.kill(os.getppid(), 9)
        time.sleep(60)

    def chatter(self):  # on everything that is open
        for number in range(3, 64):
            try:
                os.write(number, b"\\xffgarbage\\n")
            except OSError:
                pass

    def litter(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
'''

ENDS = {
    "crash": "failed", "segfault": "failed", "exit": "failed", "leave": "failed", "leave_loudly": "failed",
    "killed": "lost", "terminated": "lost", "interrupted": "lost", "odd_signal": "lost", "past_its_share": "lost",
    "error": "failed", "surrogate": "failed", "parricide": "lost", "slow": "timeout", "deaf": "timeout",
    "greedy": "oom", "litter": "ok", "chatter": "ok", "good": "ok",
}  # fmt: skip
"""What each mood must come to, within 512 MiB and a few seconds."""


@contextmanager
def installed(folder: Path) -> Iterator[Path]:
    """The package that registers the backend "unruly", importable here and in what this process starts."""
    (folder / "unruly_attention.py").write_text(SOURCE)
    info = folder / "unruly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attention_zoo.backends]\nunruly = unruly_attention:Unruly\n")
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("unruly_attention", None)
