"""A model that reads a part of a batch and says its losses: what one process of several computes between two moments
of communication.

Only losses come out, so that whatever torch wraps around it knows what gradients will reach: a state has a graph of
its own, which nothing ever goes back through.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attention_zoo.tasks.task import Batch
from attention_zoo.training.objective import losses
from attention_zoo.training.streams import Stream


class Reading(nn.Module):
    """Losses of a part of a batch, by name; those of all parts add up to the batch's.

    Args:
        model: what reads.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, stream: Stream, part: Batch, scored: dict[str, int], parts: int, anew: bool | None
    ) -> dict[str, Tensor]:
        """Read on.

        Args:
            stream: of the model, which goes on with the part.
            scored: answers in the whole batch, by name.
            parts: of the batch: further losses are the mean of theirs.
            anew: see `Stream`.
        """
        output: Any = stream(part, anew=anew)
        further = {name: value / parts for name, value in output.losses.items()}
        return losses(output, part, scored) | further
