"""A run that starts from a model file: what the task needs beside it starts afresh, all of it or adapters are trained.

Low-rank adapters are those of peft (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models"), which is not
among the package's requirements. A finished run's file holds the weights with the adapters added to them: `zoo.load`
reads it without peft.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.contract import named
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.saved import load
from attention_zoo.model.transformer import Transformer
from attention_zoo.rules import shown
from attention_zoo.tasks.task import Task
from attention_zoo.training.objective import Objective

ADAPTED = r".*\.(to_q|to_k|to_v|to_qk|to_out)"
"""The projections that get adapters unless `lora` has `target_modules`."""
WRITERS = {"lm": "head.", "pretraining": "head.tokens."}
"""Heads that answer with tokens, and what the names of their weights begin with."""
DIRECTIONS = {True: "sees the past only", False: "sees both sides"}


def found_in(path: str) -> Transformer | EncoderDecoder:
    """The model of a file.

    Raises:
        ValueError: where there is none, or none that can be read.
    """
    try:
        return load(Path(path).expanduser())
    except FileNotFoundError:
        raise ValueError(f"init must be a model file, or a folder that holds one, got {path!r}") from None


def started(
    found: Transformer | EncoderDecoder,
    path: str,
    task: Task,
    objective: Objective,
    options: Mapping[str, Any],
    half: Callable[[str, Transformer], Transformer],
) -> nn.Module:
    """The model of a file, with the head, the ids and the token types that a task needs.

    What is new (see `fresh_of`) is drawn from the model's seed; ids and types that the file lacks are added behind its
    own. For a task whose rows have a source a file of an encoder-decoder is taken as it is; of another model the
    half is made that it can be: the decoder where it only looks back, else the encoder. The other half is new.

    Args:
        found: in the file.
        path: of the file, for errors.
        options: of the run's model, for the number of token types.
        half: builds a new half, "encoder" or "decoder", that goes with one that there is.

    Raises:
        ValueError: for a file that does not fit the task, naming both.
    """
    types = int((options.get("embedding") or {}).get("types", 0))
    if not objective.pair:
        if isinstance(found, EncoderDecoder):
            raise ValueError(f"init={path} holds an encoder-decoder, got task {task.name}, whose rows have no source")
        if objective.head in ("lm", "pretraining") and found.causal != objective.causal:
            raise ValueError(
                f"init={path} holds a model that {DIRECTIONS[found.causal]}, got task {task.name} of objective "
                f"{objective.name}, whose model {DIRECTIONS[objective.causal]}"
            )
        classes = task.classes if objective.head in ("classify", "tokens", "pretraining") else None
        return _grown(found, head=objective.head, classes=classes, vocab=task.vocab, types=types)
    if isinstance(found, EncoderDecoder):
        encoder = _grown(found.encoder, head="hidden", vocab=task.vocab)
        decoder = _grown(found.decoder, head="lm", vocab=task.vocab)
        return _noted(EncoderDecoder(encoder=encoder, decoder=decoder), encoder=encoder, decoder=decoder)
    if found.causal:
        decoder = _grown(found, head="lm", vocab=task.vocab, cross=True)
        return _noted(EncoderDecoder(encoder=half("encoder", found), decoder=decoder), decoder=decoder)
    encoder = _grown(found, head="hidden", vocab=task.vocab)
    return _noted(EncoderDecoder(encoder=encoder, decoder=half("decoder", found)), encoder=encoder)


def held_by(found: Transformer | EncoderDecoder) -> tuple[str, ...]:
    """The halves of an encoder-decoder that the model of a file can be."""
    if isinstance(found, EncoderDecoder):
        return "encoder", "decoder"
    return ("decoder",) if found.causal else ("encoder",)


def fresh_of(model: nn.Module) -> list[str]:
    """Names of the parameters of a started model that its file does not hold, or not in this size."""
    return list(getattr(model, "fresh", ()))


def _grown(
    found: Transformer, *, head: str, vocab: int, classes: int | None = None, types: int = 0, **changes: Any
) -> Transformer:
    """A model of the same config but for what is said, with the found one's weights wherever there are some."""
    config = {**found.config, **changes, "classes": classes, "vocab": max(vocab, found.vocab)}
    if types > found.types:
        config["embedding"] = {**(config["embedding"] or {}), "types": types}
    config["head"] = head
    have = dict(found.named_parameters()) | dict(found.named_buffers())
    if {head, found.head_name} <= set(WRITERS):  # its options and weights stay, whatever stands beside it
        options = named("head", found.config["head"])[1]
        config["head"] = {"name": head, **options} if options else head
        have = {_moved(name, WRITERS[found.head_name], WRITERS[head]): value for name, value in have.items()}
    model = Transformer(**config)
    fresh = []
    with torch.no_grad():
        for name, own in [*model.named_parameters(), *model.named_buffers()]:
            given = have.get(name)
            if given is None or given.shape[1:] != own.shape[1:] or len(given) > len(own):
                fresh.append(name)
            else:
                _fill(own, given)
                if given.shape != own.shape:
                    fresh.append(name)
    model.fresh = fresh  # type: ignore[assignment]
    return model.to(next(found.parameters()).dtype)


def _moved(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _fill(own: Tensor, given: Tensor) -> None:
    if own.ndim:
        own[: len(given)] = given
    else:
        own.copy_(given)


def _noted(model: EncoderDecoder, **halves: nn.Module) -> EncoderDecoder:
    """With the fresh parts' names: all of a half that is new."""
    known = {f"{side}.{name}" for side in halves for name, _ in getattr(model, side).named_parameters()}
    fresh = {f"{side}.{name}" for side, half in halves.items() for name in fresh_of(half)}
    model.fresh = [n for n, _ in model.named_parameters() if n not in known or n in fresh]  # type: ignore[assignment]
    return model


def adapted(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The same model, with adapters; they and the fresh parts alone are trained.

    Args:
        options: of `peft.LoraConfig`: r, lora_alpha, target_modules, ...

    Raises:
        ValueError: for options that peft does not take, or without peft.
    """
    if not isinstance(options, Mapping) or "modules_to_save" in options:
        raise ValueError(f"lora must be a mapping such as {{r: 8}}, without modules_to_save, got {shown(options)}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora needs peft, which is not installed: pip install peft") from None
    fresh = set(fresh_of(model))
    try:
        inject_adapter_in_model(LoraConfig(**{"target_modules": ADAPTED, **options}), model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora must hold options of peft.LoraConfig, got {shown(options)}: {error}") from None
    for name, parameter in model.named_parameters():
        if name in fresh:
            parameter.requires_grad_()
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy in which adapters are part of the weights; the model itself where there are none."""
    if not any(hasattr(part, "base_layer") for part in model.modules()):
        return model
    model = copy.deepcopy(model)
    for name, part in list(model.named_modules()):
        if hasattr(part, "base_layer"):
            part.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, part.base_layer)
    return model
