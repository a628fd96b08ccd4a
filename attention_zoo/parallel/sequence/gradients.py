"""Shares of a group's processes summed: gradients of parameters in a few large messages, and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attention_zoo.ops.hand_over.wire import settle

BUCKET = 1 << 25
"""Bytes of gradients that are summed at once, at most, unless one alone is larger."""


def sum_gradients(parameters: Iterable[Tensor], group: Any) -> int:
    """Replace each gradient by its sum over the group, the same on every process; the bytes that this process sent.

    A parameter that got a gradient on some processes alone counts as zeros on the others; without any it keeps None.
    """
    settle()
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    if not learning:
        return 0
    device = learning[0].device
    there = torch.tensor([parameter.grad is not None for parameter in learning], dtype=torch.uint8, device=device)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=group)
    sent = there.nbytes
    wanted = [parameter for parameter, any_has in zip(learning, there.tolist()) if any_has]
    for bucket in _buckets(wanted):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        dist.all_reduce(flat, group=group)
        sent += flat.nbytes
        for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket])):
            parameter.grad = part.view_as(parameter).clone()
    return sent


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, each of one dtype."""
    found: list[list[Tensor]] = []
    room, dtype = 0, None
    for parameter in parameters:
        if parameter.dtype != dtype or parameter.nbytes > room:
            found.append([])
            room, dtype = BUCKET, parameter.dtype
        found[-1].append(parameter)
        room -= parameter.nbytes
    return found


def summed(numbers: Sequence[float], group: Any, device: Any = "cpu") -> list[float]:
    """Each number's sum over the group, in float64."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    found: list[float] = total.tolist()
    return found
