"""Tensors from one process to another: two messages, a header of integers and one buffer of bytes.

Sending does not wait. What is on its way is kept here until it has arrived, whoever forgets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attention_zoo.ops.exchange.messages import KINDS
from attention_zoo.ops.hand_over.tree import Leaf

GRAIN = 16
"""Bytes at whose multiples each tensor begins in the buffer: at least the size of any number."""
STATES, GRADIENTS = KINDS - 1, 2 * KINDS - 1
"""Tags of the two directions, which no exchange has (ops/exchange/messages.py): a model may do both."""

_on_the_way: list[tuple[Any, Tensor]] = []


@dataclass(frozen=True)
class Wire:
    """To and from one other process.

    Fields:
        group: of processes; None: the default one.
        peer: the other's rank in it.
        device: where messages must lie for the group's backend.
    """

    group: Any
    peer: int
    device: torch.device

    def send(self, tensor: Tensor, tag: int) -> None:
        """Without waiting; nobody may write to the tensor any more."""
        _on_the_way[:] = [(work, sent) for work, sent in _on_the_way if not work.is_completed()]
        _on_the_way.append((dist.isend(tensor, group=self.group, group_dst=self.peer, tag=tag), tensor))

    def receive(self, like: Tensor, tag: int) -> Tensor:
        dist.recv(like, group=self.group, group_src=self.peer, tag=tag)
        return like

    def send_numbers(self, numbers: Sequence[int], tag: int) -> None:
        self.send(torch.tensor([len(numbers)], device=self.device), tag)
        self.send(torch.tensor(numbers, dtype=torch.int64, device=self.device), tag)

    def receive_numbers(self, tag: int) -> list[int]:
        (count,) = self.receive(torch.zeros(1, dtype=torch.int64, device=self.device), tag).tolist()
        found: list[int] = self.receive(torch.zeros(count, dtype=torch.int64, device=self.device), tag).tolist()
        return found

    def send_all(self, tensors: Sequence[Tensor], tag: int) -> int:
        """As one buffer; its bytes."""
        buffer = packed(tensors, self.device)
        if len(buffer):
            self.send(buffer, tag)
        return len(buffer)

    def receive_all(self, like: Sequence[Leaf], tag: int, device: torch.device) -> list[Tensor]:
        size = sum(map(_room, like))
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        if size:
            self.receive(buffer, tag)
        return unpacked(buffer.to(device), like)


def settle() -> None:
    """Wait until all that was sent has arrived."""
    for work, _ in _on_the_way:
        work.wait()
    _on_the_way.clear()


def _room(leaf: Leaf) -> int:
    return -(-leaf.bytes // GRAIN) * GRAIN


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Their bytes, one after another."""
    parts = []
    for tensor in tensors:
        if not tensor.numel():
            continue
        # a copy, so that what holds one number has a stride of one, too
        flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        parts.append(torch.nn.functional.pad(flat, (0, -len(flat) % GRAIN)))
    made = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
    return made.to(device)


def unpacked(buffer: Tensor, like: Sequence[Leaf]) -> list[Tensor]:
    """The tensors of a buffer, in memory of their own."""
    found, at = [], 0
    for leaf in like:
        if not leaf.bytes:
            found.append(torch.empty(leaf.shape, dtype=leaf.dtype, device=buffer.device))
            continue
        part = buffer[at : at + leaf.bytes]
        found.append(part.view(leaf.dtype).view(leaf.shape).clone())
        at += _room(leaf)
    return found
