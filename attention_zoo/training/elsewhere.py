"""A trained model scored under other conditions, with the same weights: `evaluate_at` of conf/train.yaml.

    evaluate_at={longer: {seq_len: 2048}, rounds_8: {attention: {rounds: 8}}, window: {attention: {name: longformer}}}

Published results ask for it: hashing rounds in evaluation (Kitaev et al. 2020, table 2), memory in evaluation (Dai et
al. 2019, table 6), windows with and without sinks on a model trained with full attention (Xiao et al. 2023). What
cannot be is refused before training: a length that the task or the positions lack, a mechanism of other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attention_zoo.parallel.sharded import whole_state
from attention_zoo.rules import shown
from attention_zoo.tasks.task import Task
from attention_zoo.training.assembly import Assembly, check_positions
from attention_zoo.training.conditions import SEPARATOR, EvaluateAt, conditions
from attention_zoo.training.config import TrainConfig
from attention_zoo.training.evaluate import Evaluation
from attention_zoo.training.models import model_of
from attention_zoo.training.objective import objective_of


@dataclass(frozen=True)
class Elsewhere:
    """One entry of `evaluate_at`.

    Fields:
        name: of the entry.
        seq_len: tokens of the rows.
        mechanism: instead of the run's; None: the trained one.
        sets: names of the evaluation sets to score.
    """

    name: str
    seq_len: int
    mechanism: dict[str, Any] | None
    sets: tuple[str, ...]


def elsewhere(options: TrainConfig, parts: Assembly) -> list[Elsewhere]:
    """The entries of `evaluate_at`, each tried: built, its weights compared with the model's, its rows asked for.

    Raises:
        ValueError: for one that cannot be, naming it.
    """
    found = []
    for name, given in conditions(options.evaluate_at).items():
        try:
            found.append(_checked(name, given, options, parts))
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"evaluate_at.{name}: {error}") from None
    return found


def _checked(name: str, given: EvaluateAt, options: TrainConfig, parts: Assembly) -> Elsewhere:
    length = given.seq_len or options.seq_len
    if given.seq_len is not None:
        parts.task.check(length)
        check_positions(parts.model, length, getattr(parts.task, "span", 1) if parts.carry else 1)
    mechanism = None if given.attention is None else _mechanism(given.attention, options)
    entry = Elsewhere(name, length, mechanism, _sets(given, parts.task, options.batch, length))
    if mechanism is not None:
        with torch.random.fork_rng(devices=[]):  # a model that is built draws numbers that training must not miss
            _check_weights(built_at(entry, options, parts.task), parts.model)
    return entry


def _mechanism(given: Mapping[str, Any], options: TrainConfig) -> dict[str, Any]:
    """The mechanism's name and options: those of the run but for what is given, or of another mechanism."""
    if options.init or options.hybrid or not isinstance(options.attention, Mapping):
        raise ValueError("attention is of runs of one mechanism that is built anew, not of init= or hybrid=")
    own = {key: value for key, value in options.attention.items() if not key.startswith("_")}
    if "name" not in own:
        own["name"] = _name(options.attention)
    return {**own, **given} if given.get("name", own["name"]) == own["name"] else dict(given)


def _name(node: Mapping[str, Any]) -> str:
    from hydra.utils import get_object  # of what the config names already

    name: str = get_object(node["_target_"]).name
    return name


def _sets(given: EvaluateAt, task: Task, batch: int, length: int) -> tuple[str, ...]:
    names = list(task.evaluation_sets(batch, length))
    if given.sets is None:
        return ("test" if "test" in names else names[0],)
    if unknown := [name for name in given.sets if name not in names]:
        raise ValueError(f"sets must be among {', '.join(names)}, got {shown(unknown[0])}")
    return tuple(given.sets)


def built_at(entry: Elsewhere, options: TrainConfig, task: Task) -> nn.Module:
    """A model of the entry's mechanism, with fresh weights."""
    return model_of(replace(options, attention=entry.mechanism), entry.mechanism, task, objective_of(task))


def _check_weights(other: nn.Module, model: nn.Module) -> None:
    mine, theirs = ({name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (model, other))
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        first = differing[0]
        said = [f"{list(found[first])}" if first in found else "missing" for found in (mine, theirs)]
        raise ValueError(
            f"its weights must be those of the trained model, got {len(differing)} that differ, "
            f"such as {first}: trained {said[0]}, here {said[1]}"
        )


def scored(
    entries: list[Elsewhere], options: TrainConfig, parts: Assembly, stop: Callable[[], object]
) -> Iterator[tuple[str, Evaluation | None]]:
    """Each entry's sets by name ("test@longer"), scored with the weights as they are now; None where given up."""
    for label, there, name in placed(entries, options, parts):
        yield label, there.score(name, stop)


def placed(entries: list[Elsewhere], options: TrainConfig, parts: Assembly) -> Iterator[tuple[str, Assembly, str]]:
    """Each entry's sets: how they are called beside the run's own, what scores them with the weights as they are now,
    and their name there."""
    for entry in entries:
        model = parts.model
        if entry.mechanism is not None:
            with torch.random.fork_rng(devices=[]):
                model = built_at(entry, options, parts.task).to(parts.device)
            model.load_state_dict(whole_state(parts.model))
        sets = parts.task.evaluation_sets(options.batch, entry.seq_len)
        there = replace(parts, model=model, sets=sets)
        for name in entry.sets:
            yield f"{name}{SEPARATOR}{entry.name}", there, name
