"""Messages between processes: all of one exchange posted at once, none where there is nothing to say.

Every exchange has a number, which all processes of a group count alike since they make the same calls; messages are
told apart by it, so that it does not matter when each process comes to send or wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from attention_zoo.layout.placement import Placement

KINDS = 4
"""Of messages of one exchange between the same two processes, one way: see `Messages`."""
_LARGEST = 1 << 30  # of a tag, an int32
_counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def next_number(placement: Placement) -> int:
    """The number of the next exchange within the group."""
    number = _counted.get(placement.group, 0)
    _counted[placement.group] = number + 1
    return number


class Messages:
    """Some messages under way."""

    def __init__(
        self,
        placement: Placement,
        number: int,
        kind: int,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        names: tuple[str, str],
    ):
        """Post them; tensors without elements are no messages.

        Args:
            number: of the exchange.
            kind: below `KINDS`, tells messages of one exchange between the same two processes apart.
            sent, received: for each process, contiguous; what is received is written there until `wait` returns.
            names: under which they are counted: (what, forward or backward).
        """
        tag, group = (number * KINDS + kind) % _LARGEST, placement.group
        posted = [
            dist.P2POp(way, tensor, group=group, tag=tag, group_peer=peer)
            for way, tensors in ((dist.irecv, received), (dist.isend, sent))
            for peer, tensor in enumerate(tensors)
            if tensor.numel() and peer != placement.rank
        ]
        counted = sum(x.numel() * x.element_size() for peer, x in enumerate(sent) if peer != placement.rank)
        placement.traffic.add(*names, counted)
        self.name = f"{names[0]} {names[1]}"
        self.sent = sent  # they must live until they are gone
        with torch.profiler.record_function(f"exchange: {self.name}, sent"):
            self.works = dist.batch_isend_irecv(posted) if posted else []

    def wait(self) -> None:
        """Until all are here and gone."""
        if self.works:
            with torch.profiler.record_function(f"exchange: {self.name}, waits"):
                for work in self.works:
                    work.wait()
        self.works, self.sent = [], ()
