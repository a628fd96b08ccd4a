"""A model whose steps several processes share: each reads its rows, gradients are those of the whole batch.

Losses are shares of the whole batch's, so gradients are summed; torch averages them, hence the factor of `backward`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attention_zoo.parallel.sharded import Whole
from attention_zoo.parallel.world import World


class Shared:
    """What reads, in one process of a world. In a world of one it is called as it is.

    Args:
        module: its forward gives losses by name, and nothing else with gradients.
        world: of all processes.
        whole: of a model whose parameters are shared out already, which then reduce their gradients themselves.
    """

    def __init__(self, module: nn.Module, world: World, *, whole: Whole | None = None):
        self.world, self.whole = world, whole
        self.known: list[str] = []
        self.call: Callable[..., Any] = module
        if world.size > 1 and whole is None:
            # which parameters a process needs depends on its rows: projections of global tokens, for instance
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self.call = DistributedDataParallel(
                    module, process_group=world.everybody.group, broadcast_buffers=False, find_unused_parameters=True
                )

    def __call__(self, *given: Any) -> dict[str, Tensor]:
        return self.call(*given)

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Around reading and backward of a part: after the last one the gradients are those of all processes."""
        if last or not isinstance(self.call, DistributedDataParallel):
            return nullcontext()
        return self.call.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all processes' losses."""
        if self.whole is not None:
            loss = self.whole.completed(loss, self.world.everybody)
        (loss * self.world.size if self.world.size > 1 else loss).backward()

    def finish(self) -> None:
        """After the last part: what torch has not reduced by then."""
        if self.whole is not None:
            self.whole.reduce(self.world.everybody)

    def summed(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Losses by name, over all processes; one that a process does not have is 0 there."""
        if self.world.size == 1:
            return dict(losses)
        everybody = self.world.everybody
        while True:
            unknown = [name for name in losses if name not in self.known]
            values = [float(len(unknown)), *(losses.get(name, 0.0) for name in self.known)]
            found = everybody.sum(torch.tensor(values, dtype=torch.float64)).tolist()
            if not found[0]:
                return dict(zip(self.known, found[1:]))
            self.known = sorted({name for names in everybody.gathered([*self.known, *unknown]) for name in names})

    def norm(self, parameters: Sequence[Tensor], limit: float) -> float:
        """The norm of all gradients, which are made no longer than `limit`."""
        if self.whole is not None:
            return self.whole.norm(parameters, limit)
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
