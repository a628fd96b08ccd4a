"""The command that does a row's work again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from attention_zoo.report import groups
from attention_zoo.report.groups import MECHANISM
from attention_zoo.results.row import Row

GROUPS = ("model", "optimizer", "schedule", "trainer", "task")
_CELL = ("variant", "batch", "heads", "head_width", "causal", "device", "dtype", "threads")


def command_of(row: Row) -> str:
    """The command line of the same work in words of `train` or `benchmark`; "" where none does it.

    A training's is that of its mechanism and task with every setting of theirs, so that later defaults change nothing;
    what a preset names is left to `config`, which stands beside it.
    """
    config = row.get("config") or {}
    if row["kind"] == "speed":
        words = list(_cell(row, config))
        return shlex.join(["python", "-m", "experiments.benchmark", *words])
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
    yield from (f"{key}={_word(row[key])}" for key in _CELL if row.get(key) is not None)
    for key, value in groups.flat(config.get("options") or {}):
        yield f"+options.{row['backend']}.{key}={value}"


def _training(row: Row, config: dict[str, Any]) -> Iterator[str]:
    attention = config.get("attention")
    if config.get("hybrid"):
        yield f"hybrid={_word(config['hybrid'])}"
    elif isinstance(attention, dict) and attention.get("name"):
        yield f"attention={attention['name']}"
        yield from _leaves("attention", attention, ("name",))
    yield f"task={row.get('task')}"
    for name in GROUPS:
        if isinstance(config.get(name), dict):
            yield from _leaves(name, config[name])
    for key, value in config.items():
        if key not in (*MECHANISM, *GROUPS, "tracker") and not isinstance(value, dict):
            yield f"{key}={_word(value)}"


def _leaves(name: str, group: dict[str, Any], without: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in group.items():
        if not key.startswith("_") and key not in without:
            yield f"{name}.{key}={_word(value)}"


def _word(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(inner)}' for key, inner in value.items())}}}"
    return str(value)
