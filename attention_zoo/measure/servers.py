"""Processes that import once and fork whenever they are asked to, from the side of who asks."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from attention_zoo.measure.ends import Ended, how_it_ended, oom_kills
from attention_zoo.measure.link import Link, Nonsense
from attention_zoo.stopping import child_command

START_S = 300.0
"""For the imports, on a machine under load."""
STOP_S = 10.0
TAIL = 2**16
"""Bytes of a log that are read: its end."""

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


class Gone(Exception):
    """A server is no more, or speaks nonsense.

    Args:
        ended: what became of it, in the words of rows.
    """

    def __init__(self, ended: Ended):
        super().__init__(ended.reason)
        self.ended = ended


class Scratch:
    """A file without a name: nothing is left of it, however its processes end."""

    def __init__(self) -> None:
        # in memory where the system has such files, so that a full disk does not matter
        memory = getattr(os, "memfd_create", None)
        if memory is not None:
            self.descriptor: int = memory("attention_zoo")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())

    def clear(self) -> None:
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)

    def end(self) -> bytes:
        """What was written last."""
        size = os.fstat(self.descriptor).st_size
        return os.pread(self.descriptor, TAIL, max(0, size - TAIL))

    def all(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Server:
    """Runs a module that talks to its `forked.link_to_parent`, in a process that ends with this one.

    Args:
        module: says {"ready": true} once it is.
        python: by whom it is run.

    Raises:
        Gone: if it cannot be started.
    """

    def __init__(self, module: str, python: str = sys.executable):
        ours, theirs = socket.socketpair()
        self.log, self.link, self._kills = Scratch(), Link(ours), oom_kills()
        self._ended: Ended | None = None
        try:
            with theirs:
                self._process = subprocess.Popen(
                    child_command(module, str(theirs.fileno()), python=python),
                    stdin=subprocess.DEVNULL,
                    stdout=self.log.descriptor,
                    stderr=self.log.descriptor,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # Ctrl-C in a terminal is for this process, which then ends the others
                    env=server_environment(here=python == sys.executable),
                )
        except OSError as error:
            self.link.close()
            self.log.close()
            raise Gone(Ended("failed", f"{python} cannot be run: {error.strerror}")) from None
        try:
            self.hear(START_S)
        except TimeoutError:
            self.kill()
            raise Gone(Ended("failed", f"{module} was not imported within {START_S:g} s")) from None
        except BaseException:
            self.kill()
            raise

    def ask(self, what: Any, files: Sequence[int] = ()) -> dict[str, Any]:
        """Say something and wait for the answer.

        Raises:
            Gone: if there will be none.
        """
        self.link.say(what, files)  # if it cannot be said, there is nothing to hear either
        return self.hear()

    def hear(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next thing it says.

        Raises:
            Gone: if there will be none.
            TimeoutError: if there was none within so many seconds.
        """
        try:
            said = self.link.hear(None if timeout_s is None or math.isinf(timeout_s) else timeout_s)
        except Nonsense as error:
            self.kill()
            raise Gone(Ended("failed", f"the measuring process said {error}")) from None
        if isinstance(said, dict):
            return said
        raise Gone(self._end())

    def _end(self) -> Ended:
        if self._ended is None:
            code = self._wait()
            said = self.log.end().decode(errors="replace")
            status, reason = how_it_ended(code, said, killed_for_memory=oom_kills() > self._kills)
            self._ended = Ended(status, f"the measuring process is gone: {reason}")
        return self._ended

    def _wait(self) -> int:
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # it closed its end and lives on
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """Let it end, which it does as soon as nobody can ask any more."""
        self.link.close()
        self._end()
        self.log.close()

    def kill(self) -> None:
        """End it at once, and with it what it has forked."""
        self._process.kill()
        self.close()
