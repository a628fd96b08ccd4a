"""The peak memory of a training on a CPU, where no allocator counts: its second step is observed, tensor by tensor.

The first step makes the optimizer's state, the second is like all that follow. What the peak counts is what CUDA's
allocator counts there: weights, gradients, the states that are carried, and the worst moment of the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

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
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *_tensors(trainer.optimizer.state_dict()["state"])]
    held += [each.grad for each in trainer.parameters if each.grad is not None]
    held += [tensor for stream in trainer.streams for tensor in _tensors(stream.state)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
