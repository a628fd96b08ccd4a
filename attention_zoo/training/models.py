"""The model of a run: one skeleton, or two for tasks whose rows have a source, new or from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hydra.utils import instantiate
from torch import nn

from attention_zoo.contract import Unsupported, able
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.initial import keyed
from attention_zoo.model.transformer import Transformer
from attention_zoo.tasks.task import Task
from attention_zoo.training.building import build
from attention_zoo.training.config import BESIDE_INIT, TrainConfig, beside_init
from attention_zoo.training.groups import DecodeConfig, SideConfig
from attention_zoo.training.objective import Objective
from attention_zoo.training.tuned import adapted, found_in, held_by, started


def model_of(options: TrainConfig, mechanism: Any, task: Task, objective: Objective) -> nn.Module:
    """What is trained.

    Args:
        mechanism: see `mechanism_of`.
        objective: of the task.

    Raises:
        ValueError: for options that do not go together.
        Unsupported: for a mechanism that has no such role.
    """
    _check_halves(options, task, objective)
    given: dict[str, Any] = {"vocab": task.vocab, "seed": options.seed, "global_tokens": task.global_tokens}
    if options.init is not None:

        def half(side: str, other: Transformer) -> Transformer:
            return _half(options, mechanism, side, {**given, "dim": other.dim, "heads": other.config["heads"]})

        found = found_in(options.init)
        _check_beside_init(options, objective, held_by(found))
        model = started(found, options.init, task, objective, options.model, half)
        return model if options.lora is None else adapted(model, options.lora)
    if options.lora is not None:
        raise ValueError("lora belongs to init=, whose weights it leaves as they are, got lora without init")
    if objective.pair:
        halves = {side: _half(options, mechanism, side, given) for side in ("encoder", "decoder")}
        return EncoderDecoder(**halves)
    given |= {"causal": objective.causal, "head": objective.head}
    if objective.head in ("classify", "tokens", "pretraining"):
        given["classes"] = task.classes
    with keyed(options.seed) as draws:
        made = build(options.model, "model", attention=mechanism, **given)
        draws.again(made)
    return made


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


def _check_halves(options: TrainConfig, task: Task, objective: Objective) -> None:
    for side in ("encoder", "decoder"):
        said = [name for name, value in asdict(getattr(options, side)).items() if value is not None]
        if said and not objective.pair:
            raise ValueError(
                f"{side}.{said[0]} (model=encoder_decoder has some) belongs to tasks whose rows have a source, "
                f"got task {task.name} of objective {objective.name}"
            )
    changed = [name for name, value in asdict(options.decode).items() if value != getattr(DecodeConfig, name)]
    if changed and not objective.pair:
        raise ValueError(
            f"decode.{changed[0]} belongs to tasks whose rows have a source, "
            f"got task {task.name} of objective {objective.name}"
        )


def _check_beside_init(options: TrainConfig, objective: Objective, held: Sequence[str]) -> None:
    """What a file says stands: nothing else may be said of it."""
    init = str(options.init)
    whole = not objective.pair or len(held) == 2
    for name in ("attention", "hybrid"):
        if whole and getattr(options, name):
            raise ValueError(beside_init(name, init))
    for name in () if objective.pair else options.model:
        if name not in BESIDE_INIT:
            raise ValueError(beside_init(f"model.{name}", init))
    for side in held if objective.pair else ():
        if getattr(options, side).attention is not None:
            raise ValueError(f"{side}.attention is that of the file of init={init}: leave it out")


def _half(options: TrainConfig, mechanism: Any, side: str, given: Mapping[str, Any]) -> Transformer:
    own: SideConfig = getattr(options, side)
    changed = {name: value for name, value in asdict(own).items() if value is not None and name != "attention"}
    chosen = (mechanism or "full") if own.attention is None else own.attention
    causal = side == "decoder"
    role = {"causal": causal, "cross": causal, "head": "lm" if causal else "hidden"}
    try:
        with keyed(options.seed) as draws:
            made = build({**options.model, **given, **changed}, side, attention=chosen, **role)
            draws.again(made, of=side)
        return made
    except Unsupported as error:
        if error.backend != name_of(chosen) or not error.option.startswith(("causal", "cross")):
            raise  # it is no matter of the half's role
        raise Unsupported(f"{side}.attention={name_of(chosen)}", "this half", str(error), roles()) from error


def roles() -> str:
    """Which mechanism can be which half of an encoder-decoder."""
    return f"encoder: {able(two_sided=True)}; decoder: {able(causality=('strict', 'values'))}"
