"""Quality on a fixed set: mean loss and accuracy over the scored tokens, and the loss by how much came before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention_zoo.tasks.task import IGNORED, Batch, Task
from attention_zoo.training.precision import Precision
from attention_zoo.training.streams import Stream

BINS = 32


class Evaluation(NamedTuple):
    """Result on one set: metrics by name, and [position, loss in nats] where rows are streams."""

    metrics: dict[str, float]
    loss_by_position: list[list[float]]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each scored token [n], in float32 or better."""
    scored = targets != IGNORED
    logits = logits[scored]
    return functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets[scored], reduction="none"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    *,
    precision: Precision,
    device: str,
    carry: bool,
    stop: Callable[[], object] = lambda: None,
) -> Evaluation | None:
    """Score a model on one set. The model is put in evaluation mode and left in the mode it had.

    Args:
        carry: whether the state crosses from batch to batch, as in training.
        stop: asked before every batch; where it answers anything true, the evaluation is given up.

    Returns:
        the task's metrics; where the task's rows are streams, the mean loss in up to 32 equal bins of the position
        (tokens since the row started afresh), each named by its middle. None where it was given up.
    """
    was_training = model.training
    model.eval()
    stream = Stream(model, carry=carry)
    losses, hits, places = [], [], []
    before = torch.zeros(0, dtype=torch.long)
    try:
        for batch in batches:
            if stop():
                return None
            length = batch.ids.shape[1]
            before = torch.where(batch.fresh, 0, before) if len(before) == len(batch.fresh) else batch.fresh.long() * 0
            moved = batch.to(device)
            with precision.autocast():
                logits = stream(moved).logits
            scored = batch.targets != IGNORED
            losses.append(token_losses(logits, moved.targets).double().cpu())
            hits.append((logits.argmax(-1).cpu() == batch.targets)[scored])
            if task.streams:
                places.append((before[:, None] + torch.arange(length))[scored])
            before = before + length
    finally:
        model.train(was_training)
    loss, hit = torch.cat(losses), torch.cat(hits)
    metrics = task.score(float(loss.mean()), float(hit.double().mean()))
    return Evaluation(metrics, _by_position(torch.cat(places), loss) if places else [])


def _by_position(place: Tensor, loss: Tensor) -> list[list[float]]:
    total = int(place.max()) + 1
    width = -(-total // BINS)
    bin = place // width
    count = torch.bincount(bin).double()
    mean = torch.bincount(bin, loss) / count
    return [[min(i * width + width // 2, total - 1), float(mean[i])] for i in range(len(count))]


def is_better(task: Task, new: float, old: Any) -> bool:
    """Whether a value of the task's main metric beats the best so far (None: nothing so far)."""
    return old is None or (new > old if task.better == "higher" else new < old)
