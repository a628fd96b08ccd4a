"""What the rows of all processes carry, in each of them: one message a step, under way while the step goes backward.

Each sends one buffer of a length that all have agreed upon: how long it would be, how long its description is (JSON),
the description, its tensors one after another. Whoever needs more says so in the first number, which all read alike;
then all send again, with room for it. What came is read when somebody asks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as there

from attention_zoo.parallel.world import Team
from attention_zoo.training.checkpoint import pack
from attention_zoo.training.lifted import lifted, lowered

GRAIN = 16
"""Bytes at whose multiples each tensor begins: at least the size of any number."""
HEADER = 16
"""Bytes of the two numbers that a buffer begins with."""


@dataclass(frozen=True)
class Copied:
    """States of all processes at one moment.

    Fields:
        buffers: of each process.
    """

    buffers: tuple[Tensor, ...]

    def trees(self) -> list[list[Any]]:
        """Of each process, for each part of its rows, the state as `checkpoint.pack` gives it."""
        return [_read(buffer) for buffer in self.buffers]


def nothing_carried(processes: int, parts: int) -> Copied:
    """Of a run that carries nothing."""
    return Copied((_written([pack(None)] * parts),) * processes)


class Copies:
    """The exchange of one run.

    Args:
        team: all processes.
    """

    def __init__(self, team: Team):
        self.team, self.room = team, HEADER
        self.own = torch.empty(0, dtype=torch.uint8)
        self.came: list[Tensor] = []
        self.work: Any = None

    def begin(self, states: Sequence[Any]) -> None:
        """Send what this process's rows carry, for each part of them. All processes begin, and then end."""
        self.own = _written([pack(state) for state in states])
        self._send()

    def end(self) -> Copied:
        """What all sent."""
        while True:
            self.work.wait()
            buffers, self.came = tuple(self.came), []
            most = max(int(buffer[:8].view(torch.int64)) for buffer in buffers)
            if most <= self.room:
                return Copied(buffers)
            self.room = _up(most + most // 8)  # states may grow a little from step to step
            self._send()

    def _send(self) -> None:
        sent = nn.functional.pad(self.own, (0, self.room - len(self.own)))  # or cut off
        self.came = [torch.empty_like(sent) for _ in range(self.team.size)]
        self.work = there.all_gather(self.came, sent, group=self.team.group, async_op=True)


def _written(trees: Sequence[Any]) -> Tensor:
    """A buffer as it is sent, on the host."""
    tensors: dict[str, Tensor] = {}
    plain = [lifted(tree, "", tensors) for tree in trees]
    sizes = [[name, list(each.shape), str(each.dtype).removeprefix("torch.")] for name, each in tensors.items()]
    said = json.dumps([plain, sizes]).encode()
    said += b" " * (-len(said) % GRAIN)
    parts = [torch.frombuffer(bytearray(said), dtype=torch.uint8)]
    for each in tensors.values():
        flat = each.flatten().view(torch.uint8).cpu() if each.numel() else parts[0][:0]
        parts.append(nn.functional.pad(flat, (0, -len(flat) % GRAIN)))
    length = HEADER + sum(map(len, parts))
    return torch.cat([torch.tensor([length, len(said)]).view(torch.uint8), *parts])


def _read(buffer: Tensor) -> list[Any]:
    """The trees of a buffer."""
    at = HEADER + int(buffer[8:HEADER].view(torch.int64))
    plain, sizes = json.loads(buffer[HEADER:at].numpy().tobytes())
    tensors = {}
    for name, shape, kind in sizes:
        dtype = getattr(torch, kind)
        count = math.prod(shape) * dtype.itemsize
        tensors[name] = buffer[at : at + count].view(dtype).view(shape).clone()
        at = _up(at + count)
    return [lowered(tree, tensors) for tree in plain]


def _up(count: int) -> int:
    return -(-count // GRAIN) * GRAIN
