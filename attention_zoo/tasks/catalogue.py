"""What can be learned here: each yaml in conf/task/ in a line of a table, or on a page."""

from __future__ import annotations

import inspect
import sys
from importlib import resources
from pkgutil import resolve_name
from typing import Any

from omegaconf import OmegaConf

from attention_zoo.rules import near
from attention_zoo.tasks.task import Task

COLUMNS = ("task", "objective", "judged by", "steps × batch × tokens", "what it is")


def names() -> list[str]:
    """All of conf/task/."""
    folder = resources.files("attention_zoo.conf").joinpath("task")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def text_of(name: str) -> str:
    """The yaml of a task.

    Raises:
        ValueError: for a name that is none.
    """
    if name not in (known := names()):
        raise ValueError(f"the task must be one of {', '.join(known)}, got {name!r}{near(name, known)}")
    return resources.files("attention_zoo.conf").joinpath("task", f"{name}.yaml").read_text()


def config_of(name: str) -> dict[str, Any]:
    """The same as values."""
    found: Any = OmegaConf.to_container(OmegaConf.create(text_of(name)))
    return dict(found)


def class_of(name: str) -> type[Task]:
    """What its `_target_` is."""
    found: type[Task] = resolve_name(config_of(name)["task"]["_target_"])
    return found


def rows() -> list[tuple[str, ...]]:
    """`COLUMNS` of every task."""
    found: list[tuple[str, ...]] = []
    for name in names():
        config, cls = config_of(name), class_of(name)
        size = " × ".join(f"{config[key]:,}" if key in config else "–" for key in ("steps", "batch", "seq_len"))
        judged = f"{cls.metric.replace('_', ' ')} ({cls.better} is better)"
        found.append((name, cls.objective, judged, size, _first(text_of(name))))
    return found


def about(name: str) -> str:
    """One task on a page, in Markdown: rules, source, chance and baselines, and its yaml."""
    cls = class_of(name)
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return f"# {name}\n\n{text}\n\n## conf/task/{name}.yaml\n\n```yaml\n{text_of(name)}```\n"


def _first(text: str) -> str:
    """The first sentence of the comment on top of a yaml."""
    lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return " ".join(lines).partition(". ")[0].rstrip(".")
