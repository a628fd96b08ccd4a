"""The processes of a run: joining them, asking them, leaving them.

    with joined("cpu", sequence=2, timeout_s=600) as world:
        total = world.everybody.sum(tensor)

Process `rank` is number rank // sequence of those that share the rows, and number rank % sequence of those that share
the tokens of its rows: these stand next to each other, since they speak most. A world of one process needs no process
group: every question is answered by the process itself.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as there

from attention_zoo.parallel.failing import Failures, sockets
from attention_zoo.parallel.launched import Launched, launched
from attention_zoo.parallel.meeting import store_of

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What is asked and agreed upon is a number or two on the host, whatever the model runs on."""
COMMUNICATION = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|pair closure|broken pipe|process ?group|tcpstore|socket", re.I
)
"""Words of the errors that torch raises for a peer that is gone or does not answer."""


class Lost(RuntimeError):
    """Another process of the run is gone, or has not answered in time. One line."""

    @classmethod
    def because(cls, error: BaseException, timeout_s: float) -> Lost:
        """Of an error of torch's.

        Args:
            timeout_s: how long others are waited for.
        """
        text = " ".join(str(error).split())[:200]
        return cls(
            f"another process of the run is gone or has not answered within parallel.timeout_s={timeout_s:g}: {text}"
        )


class SaidByFirst(ValueError):
    """What process 0 could not do, as the others hear of it. One line, that of its own error."""


class SaidByOther(ValueError):
    """What another process could not do, so that this one has ended. One line: which process, and its own error."""


@dataclass(frozen=True)
class Team:
    """Some of the processes: those of one purpose.

    Fields:
        rank: of this process among them.
        size: how many they are.
        group: of torch; None for one process alone, which nobody is asked about.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all of them, in place."""
        if self.size > 1:
            there.all_reduce(tensor, group=self.group)
        return tensor

    def most(self, number: float) -> float:
        """The largest of a number that each has."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        there.all_reduce(found, there.ReduceOp.MAX, group=self.group)
        return float(found)

    def shared(self, value: T) -> T:
        """What the first of them has, for all."""
        if self.size == 1:
            return value
        said: list[Any] = [value if self.rank == 0 else None]
        there.broadcast_object_list(said, group_src=0, group=self.group, device=torch.device("cpu"))
        return said[0]

    def gathered(self, value: T) -> list[T]:
        """What each of them has, in their order, for all."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        there.all_gather_object(found, value, group=self.group)
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        self.sum(torch.zeros(()))


@dataclass(frozen=True)
class World:
    """All processes of a run, and the two ways in which they are told apart.

    Fields:
        everybody: all of them.
        data: those that have the same place in other rows: one of each that share the tokens of a row.
        sequence: those that share the tokens of the same rows.
        device: of this process: "cpu", "cuda", or "cuda:1" where a machine has several.
        timeout_s: how long one is waited for.
        failures: why one of them ends, as they tell each other.
    """

    everybody: Team = field(default_factory=Team)
    data: Team = field(default_factory=Team)
    sequence: Team = field(default_factory=Team)
    device: str = "cpu"
    timeout_s: float = math.inf
    failures: Failures | None = None

    @property
    def rank(self) -> int:
        return self.everybody.rank

    @property
    def size(self) -> int:
        return self.everybody.size

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def by_first(self, work: Callable[[], T]) -> T:
        """What the first process gets from `work`, for all. It must travel: plain values and tuples of them.

        Raises:
            SaidByFirst: in the others where it failed there, and there its own error.
        """
        if self.size == 1:
            return work()
        value: Any = None
        error: BaseException | None = None
        if self.first:
            try:
                value = work()
            except Exception as raised:
                error = raised
        value, wrong = self.everybody.shared((value, None if error is None else " ".join(str(error).split())))
        if error is not None:
            raise error
        if wrong is not None:
            raise SaidByFirst(wrong)
        return value

    def ended(self, error: BaseException, own: Mapping[str, Any]) -> dict[str, Any]:
        """How the work of all ends where `error` was raised here, see `Failures.ended`.

        Args:
            own: what this process says of it.
        """
        return dict(own) if self.failures is None else self.failures.ended(own, lost=is_lost(error))

    @property
    def spoke(self) -> bool:
        """Whether the work ended by what this process said, before all others."""
        return self.failures is not None and self.failures.spoke

    def agreed(self, asked: Callable[[], signal.Signals | None]) -> Callable[[], signal.Signals | None]:
        """Who asks a process to stop asks all: what each of them was told, as all know it when all have asked."""
        if self.size == 1:
            return asked
        return lambda: signal.Signals(found) if (found := int(self.everybody.most(asked() or 0))) else None


@contextmanager
def joined(device: str, *, sequence: int = 1, timeout_s: float, found: Launched | None = None) -> Iterator[World]:
    """The processes that a launcher has started, as one world, until the end of the `with`.

    Where somebody has joined them already (Ray's trainer does), their group is taken and left as it is.

    Args:
        device: "cpu" or "cuda", where each takes the one of its number on the machine.
        sequence: how many share the tokens of a row; divides their number.
        timeout_s: how long one waits for another, in joining and in everything after it.
        found: which process this is; default by the environment.

    Raises:
        ValueError: for a number that does not divide, or a machine with fewer devices than processes.
        Lost: where the others do not come in time.
        SaidByOther: where one waits for another that has ended, saying why.
    """
    found = launched() if found is None else found
    if found.size % sequence:
        raise ValueError(f"parallel.sequence must divide the number of processes, got {sequence} for {found.size}")
    kind = torch.device(device).type
    if found.size == 1:
        yield World(device=device)
        return
    ours = not there.is_initialized()
    with telling(timeout_s):
        known = set(sockets()) if ours else None
        if ours:
            store = store_of(found, timeout_s)
            there.init_process_group(
                BACKENDS[kind],
                init_method=found.meeting if store is None else None,
                store=store,
                rank=found.rank,
                world_size=found.size,
                timeout=timedelta(seconds=timeout_s),
            )
        failures = Failures(found.rank, found.size, known)
        try:
            # who ended while another still meets it would end that one too, which has no store yet to look for a reason
            Team(found.rank, found.size, there.group.WORLD).wait()
            failures.met()
            world = _divided(found, sequence, _own_device(kind, found.local_rank), timeout_s)
            failures.met()
            yield replace(world, failures=failures)
        except Exception as error:
            text = " ".join(str(error).split())
            line = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
            said = failures.ended({"error": line}, lost=is_lost(error))
            if is_lost(error) and failures.first is not None:
                raise SaidByOther(said["error"]) from error
            raise
        finally:
            if ours:
                failures.linger()
                there.destroy_process_group()


@contextmanager
def telling(timeout_s: float) -> Iterator[None]:
    """A stretch in which torch's errors of communication are raised as `Lost`."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, Lost | NotImplementedError) or not is_lost(error):
            raise
        raise Lost.because(error, timeout_s) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a peer is gone or does not answer."""
    return isinstance(error, Lost | there.DistError) or (
        isinstance(error, RuntimeError | ConnectionError) and COMMUNICATION.search(str(error)) is not None
    )


def _divided(found: Launched, sequence: int, device: str, timeout_s: float) -> World:
    everybody = Team(found.rank, found.size, there.group.WORLD)
    alone = Team()
    if sequence == 1:
        return World(everybody, everybody, alone, device, timeout_s)
    if sequence == found.size:
        return World(everybody, alone, everybody, device, timeout_s)
    rows, place = divmod(found.rank, sequence)
    teams = [
        [list(range(start, start + sequence)) for start in range(0, found.size, sequence)],
        [list(range(first, found.size, sequence)) for first in range(sequence)],
    ]
    # every process takes part in the making of every group
    limit = timedelta(seconds=timeout_s)
    made = [[there.new_group(ranks, timeout=limit) for ranks in kind] for kind in teams]
    return World(
        everybody,
        Team(rows, found.size // sequence, made[1][place]),
        Team(place, sequence, made[0][rows]),
        device,
        timeout_s,
    )


def _own_device(kind: str, local_rank: int) -> str:
    if kind != "cuda":
        return kind
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"a machine must have a CUDA device for each process on it, got process {local_rank} and "
            f"{torch.cuda.device_count()} devices; start fewer, or device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"
