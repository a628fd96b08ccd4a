"""What a run may be told: the schema that guards types and names, the rules across fields, and composing by overrides.

Hydra checks types and names against the schema when it composes conf/train.yaml; `check` applies the same schema to a
plain dict, so that a run started from Python is guarded alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attention_zoo.measure.environment import resolved_device
from attention_zoo.model.mechanisms import entries
from attention_zoo.options import (
    NonNegative,
    Positive,
    SeedOfRun,
    Text,
    Threads,
    check_fields,
    check_target,
)
from attention_zoo.parallel.config import ParallelConfig
from attention_zoo.registry import recipe, third_party
from attention_zoo.results.regime import REGIMES
from attention_zoo.room import fits
from attention_zoo.rules import OneOf, near, shown
from attention_zoo.searchpath import of_this_job
from attention_zoo.searchpath import register as register_searchpath
from attention_zoo.settings import finite, one_line, plain_values
from attention_zoo.training.conditions import conditions
from attention_zoo.training.groups import DecodeConfig, SideConfig, TrainerConfig
from attention_zoo.training.heard import PAIR, check_heard, trained_for
from attention_zoo.training.precision import check_precision

CONF = "attention_zoo.conf"


@dataclass
class TrainConfig:
    """conf/train.yaml.

    Fields:
        attention: conf/attention/<name>.yaml.
        hybrid: list of backend names tiled over depth, instead of `attention`; null for one mechanism throughout.
        backend: the name under which results are shown; null takes the mechanism's.
        model, task, optimizer, schedule, tracker: their groups.
        trainer: its group.
        parallel: its group: how several processes share the work.
        encoder, decoder: what differs in each half of an encoder-decoder, for tasks whose rows have a source.
        decode: how such a model writes in evaluation.
        evaluate_at: name -> other conditions that the trained model is scored under, too; see `conditions`.
        init: a model to start from: a folder that `convert` wrote, a finished run's, or a model file. Its mechanisms
            and sizes then stand for `attention` and `model`; what the task needs beside it (a head, more ids, token
            types) starts afresh.
        lora: with init: train low-rank adapters (peft) of these options alone, {r: 8}, and the fresh parts.
        steps: optimisation steps.
        seq_len: tokens of a row.
        batch: rows of a step.
        regime: what a comparison made equal for all its backends, for the row: steps | flops | seconds | parameters |
            keys. It changes nothing by itself: steps, width and options are what they are.
        rates: learning rates of which a comparison has chosen `optimizer.lr` for this backend, on validation.
        seed: of weights, data order and all other randomness.
        device: auto | cpu | cuda.
        threads: of torch on the CPU; null leaves torch's.
        force: run again although finished, and from the start.
        retry: null | failed: run again what ended as failed, oom or timeout.
        dry: say what it will take, and run nothing.
        output: folder of all runs.
    """

    attention: Any = MISSING
    hybrid: list[Any] | None = None
    backend: Text | None = None
    model: Any = MISSING
    task: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: Any = MISSING
    encoder: SideConfig = field(default_factory=SideConfig)
    decoder: SideConfig = field(default_factory=SideConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate_at: dict[str, Any] = field(default_factory=dict)  # EvaluateAt
    init: Text | None = None
    lora: Any = None
    steps: Positive = MISSING
    seq_len: Positive = MISSING
    batch: Positive = MISSING
    regime: Annotated[str, OneOf(*REGIMES)] = "steps"
    rates: list[NonNegative] | None = None
    seed: SeedOfRun = 0
    device: Text = "auto"
    threads: Threads | None = None
    force: bool = False
    retry: Annotated[str, OneOf("failed")] | None = None
    dry: bool = False
    output: Text = "runs"


OWN = {
    "model": ("attention", "vocab", "causal", "cross", "head", "classes", "global_tokens", "seed"),
    "optimizer": ("model",),
    "schedule": ("steps",),
    "tracker": ("info",),
    "task": (),
}
"""Groups with a `_target_`, and the options of it that are the run's to say."""

PARTS: dict[str, Any] = {
    "trainer": TrainerConfig, "parallel": ParallelConfig, "encoder": SideConfig, "decoder": SideConfig,
    "decode": DecodeConfig,
}  # fmt: skip
"""Groups without a `_target_`, and what they become."""

BESIDE_INIT = ("_target_", "_partial_", "embedding")
"""What a model's config may hold with init=: the task's token types are added to the file's."""


def register() -> None:
    """Make the schema known to Hydra, which conf/train.yaml names first, and the backends of other packages."""
    register_searchpath()
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for name, node in third_party().items():
        store.store(group="attention", name=name, node=node)


def compose_training(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config of one run as plain values: conf/train.yaml with overrides as on the command line.

        config = compose_training(["attention=longformer", "task=mqar", "steps=200"])

    Raises:
        ValueError: for an unknown name or value, in one line.
    """
    register()
    overrides = [*of_this_job(), *overrides]
    before = GlobalHydra.instance().hydra  # within a Hydra job there is one already: put it back after
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF, version_base="1.3"):
            composed = compose("train", overrides, return_hydra_config=True)
    except Exception as error:
        if (line := one_line(error, overrides)) is None:
            raise
        raise ValueError(line) from None
    finally:
        if before is not None:
            GlobalHydra.instance().initialize(before)
    return plain(composed, composed.hydra)


def plain(composed: Any, hydra: Any) -> dict[str, Any]:
    """A composed config as plain values, named after the chosen attention unless it has a name.

    Args:
        composed: by Hydra.
        hydra: Hydra's own part of it, which a job's config comes without.
    """
    config = plain_values(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
    attention = hydra.runtime.choices.get("attention")
    if attention is None:
        config["attention"] = None  # Hydra merged several into one, which is none of them: `check` refuses it
    said = [word.lstrip("+~").partition("=")[0] for word in hydra.overrides.task]
    if config["init"]:
        _beside_init(config, said)
    check_heard(config, said)
    if config["backend"] is None:
        config["backend"] = _called(config, attention or "several")
    return config


def _beside_init(config: dict[str, Any], keys: Sequence[str]) -> None:
    """Options of a new model, where there is none, since a file says what it is: those that were asked for are refused,
    and the defaults go. Where the rows have a source one half is new, or both are the file's, which only it knows."""
    said = [key for key in keys if key.partition(".")[0] in ("attention", "model", "hybrid")]
    if not any(key.startswith("attention") for key in said):
        config["attention"] = None
    if trained_for(config["task"]) not in (None, PAIR):
        if said:
            raise ValueError(beside_init(said[0], config["init"]))
        config["model"] = {key: value for key, value in config["model"].items() if key in BESIDE_INIT}


def beside_init(option: str, init: str) -> str:
    """Why an option of new models does not go with a file."""
    return (
        f"{option} is of new models, and init={init} brings one: leave it out; "
        "experiments.convert with lengthen.attention swaps the mechanism of a checkpoint"
    )


def _called(config: Mapping[str, Any], attention: str) -> str:
    """What a run is called that was given no name."""
    if config["init"]:
        return Path(config["init"]).name or "init"
    name = "+".join(_names(config["hybrid"])) if config["hybrid"] else attention
    halves = [config[side]["attention"] for side in ("encoder", "decoder")]
    return name if halves == [None, None] else "->".join(_names([half or name for half in halves]))


def _names(given: Sequence[Any]) -> list[str]:
    """Of mechanisms as they are written in a config: words, mappings with a name, lists of these for a stack."""
    return [
        "+".join(_names(each)) if isinstance(each, list) else str(each["name"] if _is_named(each) else each)
        for each in given
    ]


def _is_named(given: Any) -> bool:
    return isinstance(given, Mapping) and "name" in given


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in, all types and all rules across fields checked, before anything is built.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    known = [entry.name for entry in fields(TrainConfig)]
    for key in config:
        if key not in known:
            raise ValueError(f"{key} is no option of a training run{near(str(key), known)}; known: {', '.join(known)}")
    finite(config)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), dict(config))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    full = plain_values(merged)
    check_fields(TrainConfig, full)
    options = options_of(full)
    if not full["attention"] and not full["init"]:
        raise ValueError("attention must be one mechanism; for a stack of several use 'hybrid=[longformer,full]'")
    conditions(options.evaluate_at)
    accumulate = options.trainer.accumulate
    if options.batch % accumulate:
        raise ValueError(f"trainer.accumulate must divide batch, got accumulate={accumulate} for batch={options.batch}")
    full["device"] = device_of(full["device"]) if full["device"] != "auto" else "auto"
    check_precision(options.trainer.precision, device_of(full["device"]))
    _check_mechanisms(full)
    for group, given in OWN.items():
        _check_group(group, full[group], given)
    model = full["model"]
    dim, heads = model.get("dim"), model.get("heads")
    if isinstance(dim, int) and isinstance(heads, int) and dim % heads:
        raise ValueError(f"model.heads must divide model.dim, got heads={heads} for dim={dim}")
    width = dim if isinstance(dim, int) else 1
    fits(full["batch"] * full["seq_len"] * (16 + 4 * width), f"batch={full['batch']}, seq_len={full['seq_len']}")
    return full


def options_of(config: Mapping[str, Any]) -> TrainConfig:
    """What `check` returned, with its values as typed attributes."""
    return TrainConfig(**{**config, **{name: part(**config[name]) for name, part in PARTS.items()}})


def _check_mechanisms(config: Mapping[str, Any]) -> None:
    """The attention, or the stack of several, and those of the halves: names and options."""
    for side in ("encoder", "decoder"):
        _check_entries(f"{side}.attention", config[side]["attention"])
    if config["hybrid"]:
        _check_entries("hybrid", config["hybrid"])
        return
    chosen = config["attention"]
    if isinstance(chosen, Mapping) and "_target_" in chosen:
        _check_group("attention", chosen, ("dim", "heads", "causal", "cross", "positions", "seed"))
    elif not isinstance(chosen, Mapping | str | None):
        raise ValueError(f"attention must be a name, or a mapping with a name and options, got {shown(chosen)}")
    else:
        _check_entries("attention", chosen)


def check_tracker(node: Any) -> None:
    """A tracker's config: what its `_target_` is, and its options. Raises a ValueError naming what is wrong."""
    _check_group("tracker", node, OWN["tracker"])


def _check_entries(key: str, chosen: Any) -> None:
    """One mechanism or a list of them, each a name or a mapping with a name and options."""
    try:
        listed = [] if chosen is None else entries(chosen, option=key)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f"{key}: {error}") from None
    for index, entry in enumerate(listed):
        if entry.plain is not None:
            place = f"{key}[{index}]." if isinstance(chosen, list) else f"{key}."
            check_target(recipe(entry.plain["name"])[0], entry.options, place)


def _check_group(group: str, node: Any, given: Sequence[str]) -> None:
    """One component: what its `_target_` is, and its options by the annotations of that."""
    if not (isinstance(node, Mapping) and isinstance(node.get("_target_"), str)):
        raise ValueError(f"{group} must be a mapping with a _target_, such as {group}=NAME gives, got {shown(node)}")
    name = node["_target_"]
    try:
        target = resolve_name(name)
    except Exception as error:  # an import runs other people's code
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason += f" in {Path.cwd()}, on PYTHONPATH or among what is installed"
        raise ValueError(f"{group}._target_ must name a class or function, got {name!r}: {reason}") from None
    if not callable(target):
        raise ValueError(f"{group}._target_ must name a class or function, got {name!r}")
    options = {key: value for key, value in node.items() if not str(key).startswith("_")}
    for option in given:
        if option in options:
            raise ValueError(f"{group}.{option} is the run's to say, got {shown(options[option])}")
    check_target(target, options, f"{group}.")


def device_of(device: str) -> str:
    """What a run calls its device: "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: for a word that is no device, or one that this machine lacks.
    """
    return resolved_device(device)
