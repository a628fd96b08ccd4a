"""One writer a folder: a lock that the system gives back when its owner dies, however it dies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from attention_zoo.files import Damaged, read_json, write_json


class Names(NamedTuple):
    """The files of a lock: itself, and who has it."""

    lock: str
    owner: str


WRITES = Names(".lock", ".owner.json")
"""Of who writes in a folder."""
CLAIMS = Names(".claim", ".claimer.json")
"""Of who sees to it that the work of a folder is done, by whatever process: it is taken before there is a writer."""
PEEK_S = 0.2
"""Who only looks whether there is an owner has the lock for a moment: so long is tried before a folder is busy."""


class Busy(ValueError):
    """Somebody else works in this folder. One line: who, where, since when."""


@contextmanager
def owning(
    folder: str | Path, *, names: Names = WRITES, wait_s: float = 0.0, notice: Callable[[str], None] = print
) -> Iterator[Path]:
    """Own a folder, which is made, for the length of a `with`.

    Args:
        folder: whose files nobody else shall write.
        names: of the lock.
        wait_s: how long to wait for an owner to end; infinity: as long as it takes.
        notice: told once that it waits, and for whom.

    Raises:
        Busy: if somebody else owns it, and still does after `wait_s`.
        OSError: where no lock can be written, naming the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / names.lock, is_singleton=False)
        try:
            lock.acquire(timeout=PEEK_S, poll_interval=PEEK_S / 10)
        except Timeout:
            if wait_s <= 0:
                raise Busy(_said(folder, names)) from None
            notice(f"{_said(folder, names)}; waiting for it")
            try:
                lock.acquire(timeout=wait_s if wait_s < float("inf") else -1)
            except Timeout:
                raise Busy(_said(folder, names)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    try:
        write_json(folder / names.owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield folder
    finally:
        (folder / names.owner).unlink(missing_ok=True)
        lock.release()


def owner(folder: str | Path, names: Names = WRITES) -> dict[str, object] | None:
    """Who owns a folder now, as pid, host and since (seconds since 1970); None where nobody does.

    The folder may be one that can only be read: a colleague's, or a disk that is mounted so.
    """
    folder = Path(folder)
    if not (folder / names.lock).is_file() or not _held(folder / names.lock):
        return None
    try:
        return dict(read_json(folder / names.owner))
    except (Damaged, FileNotFoundError):  # it has the lock and has not said its name yet
        return {"pid": None, "host": None, "since": None}


def _held(path: Path) -> bool:
    lock = FileLock(path, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # the library opens it for writing, which may not be allowed, or its folder goes away just now
        return _held_by_others(path)
    lock.release()
    return False


def _held_by_others(path: Path) -> bool:
    """The same of a file that may only be read; where that cannot be asked either, nobody is known to have it."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file is closed
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _said(folder: Path, names: Names) -> str:
    found = owner(folder, names)
    if found is None or found["pid"] is None:
        return f"another process works in {folder}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(found["since"]))))
    return f"process {found['pid']} on {found['host']} works in {folder} since {since}"
