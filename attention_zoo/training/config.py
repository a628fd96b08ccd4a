"""What a run may be told: the schema that guards types and names, the rules across fields, and composing by overrides.

Hydra checks types and names against the schema when it composes conf/train.yaml; `check` applies the same schema to a
plain dict, so that a run started from Python is guarded alike.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attention_zoo.contract import at_least, one_of
from attention_zoo.registry import third_party
from attention_zoo.training.precision import check_precision
from attention_zoo.training.progress import KINDS

CONF = "attention_zoo.conf"


@dataclass
class TrainerConfig:
    """conf/trainer/*.yaml.

    Fields:
        precision: float32 | bfloat16 (autocast) | float16 (autocast and loss scaling, CUDA).
        accumulate: parts that a batch is split into, to save memory; divides batch.
        clip: largest norm of the gradient; null leaves it.
        carry_state: whether backends that keep a state carry it over consecutive segments of a document.
        eval_every: steps between evaluations.
        log_every: steps between logged figures.
        checkpoint_every: steps between checkpoints.
        patience: evaluations without a better main metric after which to stop; null never.
        stop_at: value of the main metric at which to stop; null never.
        max_seconds: time budget of training, evaluations included; null is none.
        progress: auto | bar | lines | none.
    """

    precision: str = "float32"
    accumulate: int = 1
    clip: float | None = 1.0
    carry_state: bool = True
    eval_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 100
    patience: int | None = None
    stop_at: float | None = None
    max_seconds: float | None = None
    progress: str = "auto"


@dataclass
class TrainConfig:
    """conf/train.yaml.

    Fields:
        attention: conf/attention/<name>.yaml.
        hybrid: list of backend names tiled over depth, instead of `attention`; null for one mechanism throughout.
        backend: the name under which results are shown; null takes the mechanism's.
        model, task, optimizer, schedule, tracker: their groups.
        trainer: its group.
        steps: optimisation steps.
        seq_len: tokens of a row.
        batch: rows of a step.
        seed: of weights, data order and all other randomness.
        device: auto | cpu | cuda.
        threads: of torch on the CPU; null leaves torch's.
        force: run again although finished, and from the start.
        retry: null | failed: run again what ended as failed, oom or timeout.
        output: folder of all runs.
    """

    attention: Any = MISSING
    hybrid: list[Any] | None = None
    backend: str | None = None
    model: Any = MISSING
    task: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: Any = MISSING
    steps: int = MISSING
    seq_len: int = MISSING
    batch: int = MISSING
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    force: bool = False
    retry: str | None = None
    output: str = "runs"


def register() -> None:
    """Make the schema known to Hydra, which conf/train.yaml names first, and the backends of other packages."""
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
    overrides = list(overrides)
    before = GlobalHydra.instance().hydra  # within a Hydra job there is one already: put it back after
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONF, version_base="1.3"):
            composed = compose("train", overrides, return_hydra_config=True)
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        raise ValueError(line) from None
    finally:
        if before is not None:
            GlobalHydra.instance().initialize(before)
    return plain(composed, composed.hydra.runtime.choices.get("attention"))


def plain(composed: Any, attention: str | None) -> dict[str, Any]:
    """A composed config as plain values, named after the chosen attention unless it has a name.

    Args:
        composed: by Hydra.
        attention: the name chosen from the group; None where several were.
    """
    values = {key: composed[key] for key in composed if key != "hydra"}
    config: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    if attention is None:
        config["attention"] = None  # Hydra merged several into one, which is none of them: `check` refuses it
    if config["backend"] is None:
        config["backend"] = "+".join(_names(config["hybrid"])) if config["hybrid"] else attention or "several"
    return config


def _names(hybrid: Sequence[Any]) -> list[str]:
    return [entry["name"] if isinstance(entry, Mapping) else str(entry) for entry in hybrid]


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in, all types and all rules across fields checked, before anything is built.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    known = [entry.name for entry in fields(TrainConfig)]
    for key in config:
        if key not in known:
            raise ValueError(f"{key} is no option of a training run{_near(key, known)}; known: {', '.join(known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), dict(config))
        full: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from None
    trainer, model = full["trainer"], full["model"]
    if not full["attention"]:
        raise ValueError("attention must be one mechanism; for a stack of several use 'hybrid=[longformer,full]'")
    at_least(1, **{name: full[name] for name in ("steps", "seq_len", "batch")})
    at_least(0, seed=full["seed"])
    names = ("accumulate", "eval_every", "log_every", "checkpoint_every")
    at_least(1, **{f"trainer.{name}": trainer[name] for name in names})
    if trainer["patience"] is not None:
        at_least(1, **{"trainer.patience": trainer["patience"]})
    if full["threads"] is not None:
        at_least(1, threads=full["threads"])
    for name in ("clip", "max_seconds"):
        value = trainer[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"trainer.{name} must be a positive number or null, got {value!r}")
    if full["batch"] % trainer["accumulate"]:
        raise ValueError(
            f"trainer.accumulate must divide batch, got accumulate={trainer['accumulate']} for batch={full['batch']}"
        )
    dim, heads = model.get("dim"), model.get("heads")
    if isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads:
        raise ValueError(f"model.heads must divide model.dim, got heads={heads} for dim={dim}")
    one_of(KINDS, **{"trainer.progress": trainer["progress"]})
    if full["retry"] is not None:
        one_of(("failed",), retry=full["retry"])
    check_precision(trainer["precision"], device_of(full["device"]))
    return full


def device_of(device: str) -> str:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def one_line(error: BaseException) -> str | None:
    """What Hydra or OmegaConf complain about, in one line that names field, rule and value; None for other errors."""
    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for found in chain:
        missing = getattr(found, "missing_cfg_file", None)
        if missing:
            group, _, name = missing.rpartition("/")
            options = sorted(found.options or ())
            return f"{group or 'config'} must be one of {', '.join(options)}, got {name!r}{_near(name, options)}"
    # an inner OmegaConf error may still hold the places where the outer one has the value
    ours = [e for e in chain if type(e).__module__.startswith(("hydra.", "omegaconf.")) and "$VALUE" not in str(e)]
    if not ours:
        return None
    deepest = ours[-1]
    lines = [line.strip() for line in str(deepest).splitlines()]
    place = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    text = next((line for line in lines if line), type(deepest).__name__)
    if "is not in struct" in text or "not in '" in text:
        parent = getattr(deepest, "parent_node", None)
        keys = [str(key) for key in parent] if isinstance(parent, Mapping) else []
        options = [key for key in keys if key != "hydra" and not key.startswith("_")]
        key = place.rpartition(".")[2] or text
        listed = f"; known: {', '.join(options)}" if options else ""
        return f"{place or text} is no known option{_near(key, options)}{listed}"
    first = str(chain[0]).splitlines()[0].strip()
    if "parsing override" in first:
        return f"{first}: {text}; an override is written key=value"
    given = re.search(r"[\w.@+~]+=\S*", first)
    where = f"{place}: " if place and place not in text else ""
    return f"{where}{text}" + (f" (from {given.group()})" if given and given.group() not in text else "")


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
