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
        self, stream: Stream, part: Batch, scored: dict[str, int], share: float, anew: bool | None
    ) -> dict[str, Tensor]:
        """Read on.

        Args:
            stream: of the model, which goes on with the part.
            scored: answers in the whole batch, by name.
            share: of the batch's tokens that the part has, see `share_of`; further losses are means over tokens.
            anew: see `Stream`.
        """
        output: Any = stream(part, anew=anew)
        further = {name: value * share for name, value in output.losses.items()}
        return losses(output, part, scored) | further


def read_by(batch: Batch) -> int:
    """How many tokens of a batch are none of padding: those that a model with a decoder decodes."""
    return batch.ids.numel() if batch.tokens is None else int(batch.tokens.valid.sum())


def share_of(part: int, whole: int, parts: int) -> float:
    """How much of a batch a part is, by `read_by` of both; of a batch without tokens, one of its parts."""
    return part / whole if whole else 1 / parts
