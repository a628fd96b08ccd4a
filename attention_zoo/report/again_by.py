"""The command that does a row's work again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from attention_zoo.report.groups import SILENT
from attention_zoo.results.row import Row
from attention_zoo.training.config import TrainConfig

GROUPS = ("optimizer", "schedule", "trainer")
"""Groups of a training's config that stand in no other; a task brings settings of the model and of the training too."""
DEFAULTS = {"model": "tiny", "optimizer": "adamw", "schedule": "cosine", "trainer": "default", "task": "text"}
_CELL = ("variant", "batch", "heads", "head_width", "causal", "device", "dtype", "threads")
_APART = ("tracker", "backend", "attention", "hybrid", "retry", "force")


def command_of(row: Row) -> str:
    """The command line of the same work in words of `train` or `benchmark`; "" for what neither does.

    A training's names the mechanism, the task and the groups that are nearest to its config, and then whatever differs
    from them.
    """
    config = row.get("config") or {}
    if row["kind"] == "speed":
        return shlex.join(["python", "-m", "experiments.benchmark", *_cell(row, config)])
    if row["kind"] == "quality" and isinstance(config.get("task"), dict):
        return shlex.join(["python", "-m", "experiments.train", *_training(row, config)])
    return ""


def _cell(row: Row, config: dict[str, Any]) -> Iterator[str]:
    kernel = row.get("kernel")
    yield f"backends=[{row['backend']}{f'/{kernel}' if kernel not in (None, 'auto') else ''}]"
    yield f"lengths=[{row['length']}]"
    yield f"phases=[{row['phase']}]"
    yield "baselines=false"
    yield "quadratic_up_to=null"
    yield from (f"{key}={word(row[key])}" for key in _CELL if row.get(key) is not None)
    if config.get("options"):
        yield f"options={word({row['backend']: config['options']})}"
    if config.get("model"):
        yield f"models=[{word(config['model'])}]"


def _training(row: Row, config: dict[str, Any]) -> Iterator[str]:
    attention, hybrid = config.get("attention"), config.get("hybrid")
    name, usual = _mechanism(attention)
    if hybrid:
        yield f"hybrid={word(hybrid)}"
    elif name:
        yield f"attention={name}"
    if config.get("backend") not in (None, name) and not hybrid:
        yield f"backend={word(config['backend'])}"
    base = _over(asdict(TrainConfig()), _yaml("", "train"))
    task, brought = _nearest("task", config["task"], str(row.get("task")))
    yield f"task={task}" if task else f"task={row.get('task')}"
    model, sizes = _nearest("model", config.get("model"), "tiny")
    base |= {"model": sizes, "attention": usual}
    if model not in (None, DEFAULTS["model"]):
        yield f"model={model}"
    for group in GROUPS:
        chosen, base[group] = _nearest(group, config.get(group), DEFAULTS[group])
        if chosen not in (None, DEFAULTS[group]):
            yield f"{group}={chosen}"
    base = _over(base, brought)
    mine = {key: value for key, value in config.items() if key not in (*_APART, "output")}
    if name and not hybrid and isinstance(attention, dict):
        mine["attention"] = {key: value for key, value in attention.items() if key != "name"}
    yield from _differing(mine, base)


def _mechanism(attention: Any) -> tuple[str | None, dict[str, Any]]:
    """The choice of conf/attention, and what it sets: by its name, or by the class that it was composed to."""
    if not isinstance(attention, dict):
        return None, {}
    if "_target_" in attention:
        return _nearest("attention", attention, "full")
    name = attention.get("name")
    return name, _yaml("attention", str(name)) if name else {}


def _nearest(group: str, config: Any, usual: str) -> tuple[str | None, dict[str, Any]]:
    """The choice of a group from which a config differs least, and what it sets; of a task its own and all else."""
    if not isinstance(config, dict):
        return None, {}
    found = []
    for name in _names(group):
        held = _yaml(group, name)
        own = held.get("task", {}) if group == "task" else held
        if str(own.get("_target_")) == str(config.get("_target_")) or group == "trainer":
            found.append((len(list(_differing(config, own))), name != usual, name, held))
    if not found:
        return None, {}
    *_, name, held = min(found, key=lambda each: each[:3])
    return name, held


def _differing(config: dict[str, Any], base: dict[str, Any], path: str = "") -> Iterator[str]:
    """Overrides for what a config says otherwise than its base; nothing where neither says anything."""
    for key, value in config.items():
        dotted, given = f"{path}{key}", base.get(key)
        if key.startswith("_") or dotted in SILENT - {"seed"}:
            continue
        if isinstance(value, dict) and (isinstance(given, dict) or given is None):
            yield from _differing(value, given or {}, f"{dotted}.")
        elif value != given:
            yield f"{'' if key in base else '+'}{dotted}={word(value)}"


def _over(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """One config over another."""
    both = dict(base)
    for key, value in more.items():
        both[key] = _over(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


@cache
def _names(group: str) -> tuple[str, ...]:
    files = resources.files("attention_zoo.conf").joinpath(group).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@cache
def _yaml(group: str, name: str) -> dict[str, Any]:
    """What a file of the shipped configs says; nothing where there is none."""
    file = resources.files("attention_zoo.conf").joinpath(group, f"{name}.yaml")
    if not file.is_file():
        return {}
    found = OmegaConf.to_container(OmegaConf.create(file.read_text("utf-8")))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def word(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{word(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w./-]*", value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
