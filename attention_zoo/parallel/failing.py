"""What one process cannot do ends all of them, soon and with its reason: nobody waits for an answer that never comes.

Whoever fails by itself writes why into the store that all met in, and closes its connections. So whoever waits for it,
or comes to wait, gets an error at once, looks there, and ends with that line instead of one about connections. Nobody
is asked while all goes well.

Connections of gloo's are closed by the system's own word for it: torch closes them with the last reference to a group,
which a traceback or a message under way may hold, and waits before for all that is under way.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import distributed as there

T = TypeVar("T")
DESCRIPTORS = "/proc/self/fd", "/dev/fd"
ANSWER_S = 3.0
"""How long the store is waited for, which may be with a process that hangs or is gone."""
LINGER_S = 5.0
"""How long process 0, which may keep the store, waits for those that have not looked yet."""
LOOK_S = 0.02
_joined: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Failures:
    """Why processes of a world end, as they tell each other.

    Args:
        rank, size: of this process, and how many there are.
        known: `sockets()` as it was before they met; None where they had met already, and stay together afterwards.
    """

    def __init__(self, rank: int, size: int, known: set[int] | None):
        self.rank, self.size, self.known = rank, size, known
        self.store: Any = there.distributed_c10d._get_default_store()
        self.connections = set[int]()
        # of a group that several worlds use one after the other, all processes count these alike
        number = _joined.get(there.group.WORLD, 0)
        _joined[there.group.WORLD] = number + 1
        self.place = f"failed in world {number}"
        self.first: tuple[int, dict[str, Any]] | None = None

    def met(self) -> None:
        """Groups are made: what connections there are more than before, the store's aside, are theirs."""
        if self.known is not None:
            self.connections = set(sockets()) - self.known - _of_store(self.store)

    def ended(self, own: Mapping[str, Any], *, lost: bool) -> dict[str, Any]:
        """How the work ends in this process, in the words of who ended it for all; then nobody waits for anybody.

        Args:
            own: what this process says, as JSON can hold it, its `error` in one line.
            lost: whether that is only that another does not answer.
        """
        if not lost:
            self._say(own)
        found = self.heard() if lost else None
        self.cut()
        if found is None:
            return dict(own)
        rank, said = found
        return {**own, **said, "error": f"process {rank} of {self.size}: {said['error']}"}

    def _say(self, said: Mapping[str, Any]) -> None:
        own = json.dumps([self.rank, said])
        self._keep(_in_time(lambda: self.store.compare_set(self.place, "", own)))

    @property
    def spoke(self) -> bool:
        """Whether this process was the first to say anything."""
        return self.first is not None and self.first[0] == self.rank

    def heard(self) -> tuple[int, dict[str, Any]] | None:
        """The first that has said why, and what; None where nobody has, or it cannot be found out."""
        if self.first is None:
            there_is = _in_time(lambda: self.store.check([self.place]))
            self._keep(_in_time(lambda: self.store.get(self.place)) if there_is else None)
        return self.first

    def _keep(self, found: bytes | None) -> None:
        if found is None:
            return
        rank, said = json.loads(found)
        self.first = rank, said
        _in_time(lambda: self.store.set(f"{self.place}: known to {self.rank}", ""))

    def cut(self) -> None:
        """Close the connections to all others: who waits for this process does so no longer, nor does it for them."""
        now = sockets()
        for inode in self.connections & now.keys():
            with suppress(OSError), socket.socket(fileno=os.dup(now[inode])) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def linger(self) -> None:
        """Process 0 waits until all have looked, where somebody has said something."""
        if self.rank or self.known is None or self.first is None:
            return
        known, until = [f"{self.place}: known to {rank}" for rank in range(self.size)], time.monotonic() + LINGER_S
        while not _in_time(lambda: self.store.check(known)) and time.monotonic() < until:
            time.sleep(LOOK_S)


def sockets() -> dict[int, int]:
    """Of each connection over a network that this process has, the number by which the system knows it, and the
    descriptor; none where the system does not list them."""
    found = {}
    folder = next((path for path in DESCRIPTORS if os.path.isdir(path)), None)
    for name in os.listdir(folder) if folder else ():
        with suppress(OSError):  # one is that of the listing itself
            number = int(name)
            about = os.fstat(number)
            if stat.S_ISSOCK(about.st_mode) and _peer(number):
                found[about.st_ino] = number
    return found


def _peer(descriptor: int) -> tuple[int, int] | None:
    """Own and other port of a connection."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as each:
        if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
            return each.getsockname()[1], each.getpeername()[1]
    return None


def _of_store(store: Any) -> set[int]:
    """Connections to the store, or of the others to it where this process keeps it."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    port = getattr(store, "port", None)
    return {inode for inode, descriptor in sockets().items() if port in (_peer(descriptor) or ())}


def _in_time(ask: Callable[[], T]) -> T | None:
    """What the store answers; None where it does not, be it that who keeps it hangs."""
    found: list[T] = []

    def work() -> None:
        with suppress(RuntimeError):
            found.append(ask())

    asking = Thread(target=work, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return found[0] if found else None
