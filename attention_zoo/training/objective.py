"""What a model is trained for: which head and direction it needs, and from its answers to losses by name.

| objective | model | answers |
|---|---|---|
| causal_lm | decoder | the next token |
| masked_lm | encoder | the tokens that were hidden; and one label for the row, where the batch has `labels` |
| classify | encoder | one label for the row, from pooled hidden states |
| label | encoder | one label for each token |
| seq2seq | encoder and decoder | the next token of the target, all of them in one masked pass (teacher forcing) |

Every loss is a cross-entropy over the scored answers alone. Those of one batch add up: the main one and that of each of
its `labels` weigh the same, as in BERT (Devlin et al. 2019, §A.2: "the sum of the mean masked LM likelihood and the
mean next sentence prediction likelihood").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from attention_zoo.model.heads import PretrainingLogits
from attention_zoo.rules import near
from attention_zoo.tasks.task import IGNORED, Batch, Task

MAIN = "main"
"""The name of the loss over a batch's `targets`."""


class Objective(NamedTuple):
    """Which model an objective is for.

    Fields:
        name: as tasks say it.
        head: of the model; see `model.heads.HEADS`.
        causal: whether each token sees its past only.
        pair: whether there is an encoder beside the decoder.
    """

    name: str
    head: str
    causal: bool
    pair: bool = False


class Answers(NamedTuple):
    """What a model said of the scored tokens or rows.

    Fields:
        losses: [n], cross-entropy in nats of each, in float32 or better.
        hits: [n], whether the likeliest answer is right.
    """

    losses: Tensor
    hits: Tensor


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("causal_lm", "lm", True),
        Objective("masked_lm", "lm", False),
        Objective("classify", "classify", False),
        Objective("label", "tokens", False),
        Objective("seq2seq", "lm", True, pair=True),
    )
}


def objective_of(task: Task) -> Objective:
    """The objective of a task.

    Raises:
        ValueError: for a word that is none.
    """
    found = OBJECTIVES.get(task.objective)
    if found is None:
        known = ", ".join(OBJECTIVES)
        raise ValueError(
            f"{type(task).__name__}.objective must be one of {known}, got {task.objective!r}"
            f"{near(str(task.objective), list(OBJECTIVES))}"
        )
    return found._replace(head="pretraining") if found.name == "masked_lm" and task.classes else found


def counts(batch: Batch) -> dict[str, int]:
    """How many answers of each name are scored."""
    return {name: int((targets != IGNORED).sum()) for name, targets in _targets(batch).items()}


def answers(output: Any, batch: Batch) -> dict[str, Answers]:
    """What the model said where it was asked, by name.

    Args:
        output: of the model on the batch.
    """
    asked = _asked(output, batch)
    return {name: Answers(_cross_entropy(*each), each[0].detach().argmax(-1) == each[1]) for name, each in asked}


def losses(output: Any, batch: Batch, scored: dict[str, int]) -> dict[str, Tensor]:
    """Each answer's share of the batch's mean loss, summed, by name.

    Args:
        scored: `counts` of the whole batch, of which `batch` may be a part: then the parts' losses add up.
    """
    return {name: _cross_entropy(*each).sum() / max(1, scored[name]) for name, each in _asked(output, batch)}


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each scored token [n], in float32 or better."""
    return _cross_entropy(*_chosen(logits, targets))


def _asked(output: Any, batch: Batch) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """By name, the logits [n, vocabulary] and the targets [n] of what is scored."""
    for name, targets in _targets(batch).items():
        logits = output.logits
        if isinstance(logits, PretrainingLogits):
            logits = logits.tokens if name == MAIN else logits.row
        yield name, _chosen(logits, targets)


def scored_only(targets: Tensor) -> Tensor | None:
    """Which are scored; None: all."""
    scored = targets != IGNORED
    # elsewhere the host would wait to hear of it
    return None if scored.device.type == "cpu" and bool(scored.all()) else scored


def _chosen(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both of what is scored; logits may be of that alone already, see `Stream`."""
    scored = scored_only(targets)
    if scored is None:
        return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return (logits if logits.ndim == targets.ndim else logits[scored]), targets[scored]


def _targets(batch: Batch) -> dict[str, Tensor]:
    return {MAIN: batch.targets, **batch.labels}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    exact = logits if logits.element_size() == 8 else logits.float()
    return functional.cross_entropy(exact, targets, reduction="none")
