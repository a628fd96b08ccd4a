"""Messages between processes: all of one exchange posted at once, none where there is nothing to say.

Every exchange has a number, which all processes of a group count alike since they make the same calls; messages are
told apart by it, so that it does not matter when each process comes to send or wait.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from attention_zoo.layout.placement import Placement

KINDS = 4
"""Of messages of one exchange between the same two processes, one way: see `Messages`. The last is never one of them:
its tags are those of states that are handed on (ops/hand_over/wire.py)."""
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
            kind: below `KINDS - 1`, tells messages of one exchange between the same two processes apart.
            sent, received: for each process, contiguous; what is received is written there until `wait` returns.
            names: under which they are counted: (what, forward or backward).
        """
        tag, group = (number * KINDS + kind) % _LARGEST, placement.group
        peers = [peer for peer in range(placement.size) if peer != placement.rank]
        posted = [
            dist.P2POp(way, tensors[peer], group=group, tag=tag, group_peer=peer)
            for way, tensors in ((dist.irecv, received), (dist.isend, sent))
            for peer in peers
            if tensors[peer].numel()
        ]
        placement.traffic.add(*names, sum(sent[peer].numel() * sent[peer].element_size() for peer in peers))
        self.name = f"{names[0]} {names[1]}"
        self.sent = sent  # they must live until they are gone
        coming = sum(received[peer].numel() > 0 for peer in peers)
        with torch.profiler.record_function(f"exchange: {self.name}, sent"):
            works = dist.batch_isend_irecv(posted) if posted else []
        # a backend may make one of all
        self.coming, self.going = (works[:coming], works[coming:]) if len(works) == len(posted) else (works, [])

    def wait(self) -> None:
        """Until all are here. What goes to others is waited for when this object goes, or is asked to `end`."""
        with torch.profiler.record_function(f"exchange: {self.name}, waits"):
            for work in self.coming:
                work.wait()
        self.coming = []
        if not self.going:
            self.sent = ()

    def end(self) -> None:
        """Until all are here and gone."""
        self.wait()
        for work in self.going:
            work.wait()
        self.going, self.sent = [], ()

    def __del__(self) -> None:
        going, self.going = getattr(self, "going", []), []
        if not sys.is_finalizing():  # else there is no process group any more
            with suppress(RuntimeError):  # of a peer that is gone hears who waits for it
                for work in going:
                    work.wait()
