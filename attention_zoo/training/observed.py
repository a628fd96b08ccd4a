"""The peak memory of a training on a CPU, where no allocator counts: its second step is observed, tensor by tensor.

The first step makes the optimizer's state, the second is like all that follow. What the peak counts is what CUDA's
allocator counts there: weights, gradients, the states that are carried, and the worst moment of the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from attention_zoo.measure.memory import peak_memory
from attention_zoo.measure.speed import LONG_S
from attention_zoo.training.fit import History
from attention_zoo.training.trainer import Step, Trainer


def observed_step(trainer: Trainer, history: History) -> Step:
    """`Trainer.step`; that after the first sets `history.peak_bytes`, unless steps take longer than `LONG_S`, whose
    observation would cost as much again."""
    if trainer.done != 1 or history.peak_bytes is not None or history.train_seconds > LONG_S:
        return trainer.step()
    found: list[Step] = []
    held = _held(trainer)
    history.peak_bytes = held + peak_memory(lambda: found.append(trainer.step())).peak_bytes
    return found[0]


def _held(trainer: Trainer) -> int:
    """Bytes that live from step to step, the last gradients among them; a storage of several tensors counts once."""
    gradients = [each.grad for each in trainer.parameters]
    states = [stream.state for stream in trainer.streams]
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *gradients, *states, trainer.optimizer.state_dict()]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors(held)}
    return sum(storages.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree.to_local() if isinstance(tree, DTensor) else tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
