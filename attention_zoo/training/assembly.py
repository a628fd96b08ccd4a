"""All that a run works with, built from its options: model, trainer, evaluation sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from torch import nn

from attention_zoo.options import WrongOption, calls_of
from attention_zoo.tasks.task import Batch, Task
from attention_zoo.training.config import TrainConfig, device_of
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.precision import Precision
from attention_zoo.training.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    """What is trained, what trains it, and what it is scored on.

    Fields:
        sets: name -> batches; the first is the main one, by which the run is judged.
        carry: whether the model's state crosses from batch to batch.
    """

    task: Task
    model: nn.Module
    trainer: Trainer
    sets: Mapping[str, Iterable[Batch]]
    precision: Precision
    carry: bool
    device: str

    @property
    def main(self) -> str:
        """The name of the main set."""
        return next(iter(self.sets))

    def score(self, name: str, stop: Callable[[], object]) -> Evaluation | None:
        """The model on one set; None where `stop` had it given up."""
        return evaluate(
            self.model, self.task, self.sets[name],
            precision=self.precision, device=self.device, carry=self.carry, stop=stop,
        )  # fmt: skip


def assemble(options: TrainConfig, mechanism: Any, task: Task) -> Assembly:
    """Build a run's model and all around it.

    Args:
        mechanism: see `mechanism_of`.
        task: already built.
    """
    device = device_of(options.device)
    model = build(
        options.model,
        "model",
        attention=mechanism,
        vocab=task.vocab,
        causal=task.causal,
        head=task.head,
        seed=options.seed,
    ).to(device)
    carry = bool(options.trainer.carry_state and task.streams and model.carries)
    precision = Precision(options.trainer.precision, device)
    trainer = Trainer(
        model,
        optimizer=build(options.optimizer, "optimizer", model=model),
        schedule=build(options.schedule, "schedule", steps=options.steps),
        batches=task.train_batches(options.batch, options.seq_len, options.seed),
        accumulate=options.trainer.accumulate,
        clip=options.trainer.clip,
        precision=precision,
        carry=carry,
        device=device,
    )
    sets = task.evaluation_sets(options.batch, options.seq_len)
    return Assembly(task, model, trainer, sets, precision, carry, device)


def mechanism_of(options: TrainConfig) -> Any:
    """The model's `attention`: the group's partial, or a hybrid stack's list of names and mappings."""
    if options.hybrid:
        return list(options.hybrid)
    chosen = options.attention
    if isinstance(chosen, Mapping) and "_target_" in chosen:
        return instantiate({**chosen, "_partial_": True, "_convert_": "all"})
    return chosen


def name_of(mechanism: Any) -> str:
    """What a mechanism is called."""
    if isinstance(mechanism, list):
        return "+".join(name_of(one) for one in mechanism)
    if isinstance(mechanism, Mapping):
        return str(mechanism["name"])
    return getattr(getattr(mechanism, "func", None), "name", str(mechanism))


def build(config: Mapping[str, Any], group: str = "", /, **given: Any) -> Any:
    """What a `_target_` stands for, with run-time values added; its own errors, not Hydra's wrapping of them.

    Args:
        group: that the config is of, for errors: they name options by their full keys.
    """
    made = instantiate({**config, "_partial_": True, "_convert_": "all"})
    try:
        return made(**given)
    except ValueError as error:
        if not group or type(error) not in (ValueError, WrongOption):
            raise
        raise ValueError(full_key(str(error), group, made.func, given)) from error


def full_key(text: str, group: str, target: Any, given: Mapping[str, Any]) -> str:
    """An error of a component in which the option that it begins with has its full key."""
    name = re.match(r"\w*", text)[0]  # type: ignore[index]
    own = {option for call in calls_of(target) for option in call.rules} - given.keys()
    mechanism = getattr(given.get("attention"), "func", None)
    if name in own:
        return f"{group}.{text}"
    if mechanism is not None and name in {option for call in calls_of(mechanism) for option in call.rules}:
        return f"attention.{text}"
    return text if text.startswith(group) else f"{group}: {text}"
