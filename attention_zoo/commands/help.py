"""The help of a composed command: its text, its groups, and a word on each option.

The words are those of the docstrings: `Fields:` of the schema that guards an option, `Args:` of the class or function
that a group's choice builds. There is no other place for them.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from attention_zoo.overview import described

CONF = "attention_zoo.conf"
WIDEST = 120


def page(name: str, overrides: Sequence[str], program: str) -> str:
    """What `--help` prints.

    Args:
        name: of the command.
        overrides: of the command line; the options shown are those of the choices made.
        program: how the command was called.
    """
    GlobalHydra.instance().clear()
    with initialize_config_module(CONF, version_base="1.3"):
        composed = compose(name, list(overrides), return_hydra_config=True)
        groups = choices(composed)
    text = str(composed.hydra.help.template).strip()
    if not program.startswith("python"):
        text = text.replace(f"python -m experiments.{name}", program)
    parts = [text]
    if groups:
        parts.append("Groups, one choice of each: group=name")
        parts.append("\n".join(f"  {group}: {', '.join(names)}" for group, names in groups.items()))
    parts.append("Options, with their values here: key=value")
    with_words = list(options(composed))
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    parts.append("\n".join(_lines(key, value, word, width) for key, value, word in with_words))
    parts.append(
        "null: the program decides. --cfg job shows the config of a command without running it, -m runs one job for "
        "each of several values,\n--hydra-help explains Hydra itself. Quote what holds brackets or braces: "
        "'key=[1,2]', 'key={a: 1}'."
    )
    return "\n\n".join(parts)


def choices(composed: DictConfig) -> dict[str, list[str]]:
    """The groups of a root config and the names that each has; call it while Hydra is initialised."""
    loader = GlobalHydra.instance().config_loader()
    chosen = composed.hydra.runtime.choices
    return {str(group): sorted(loader.get_group_options(group)) for group in chosen if "hydra/" not in f"{group}/"}


def options(composed: DictConfig) -> Iterator[tuple[str, str, str]]:
    """Key as it is typed, value as it is typed, and what it means, of every option of a config."""
    for key in sorted((key for key in composed if key != "hydra"), key=lambda key: _nested(composed, key)):
        yield from _of_node(composed, key, str(key), {})


def _nested(node: DictConfig, key: Any) -> bool:
    return isinstance(node._get_node(key), DictConfig) and bool(_keys(node._get_node(key)))


def _keys(node: Any) -> list[Any]:
    return [] if node._is_none() or node._is_missing() or node._is_interpolation() else list(node)


def _of_node(parent: DictConfig, key: Any, path: str, words: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    words = words or _words(parent)
    node: Any = parent._get_node(key)
    meant = words.get(str(key), "")
    if not (isinstance(node, DictConfig) and _is_group(node)):
        yield path, _value(parent, node, key), meant
        return
    inner = _words(node)
    for name in _keys(node):
        if not str(name).startswith("_"):
            yield from _of_node(node, name, f"{path}.{name}", inner)


def _is_group(node: DictConfig) -> bool:
    """Whether its options are told one by one: those of a schema, of a component, or of a mapping of schemas."""
    if dataclasses.is_dataclass(OmegaConf.get_type(node)) or "_target_" in _keys(node):
        return True
    return any(dataclasses.is_dataclass(OmegaConf.get_type(node._get_node(name))) for name in _keys(node))


def _words(node: DictConfig) -> dict[str, str]:
    """What the docstring of a node's schema or target says of each key."""
    kind: Any = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        if "_target_" not in _keys(node):
            return {}
        kind = get_object(node["_target_"])
    owners = reversed(kind.__mro__) if isinstance(kind, type) else [kind]
    return {key: word for owner in owners for key, word in _described(owner)}


def _described(owner: Any) -> Iterator[tuple[str, str]]:
    for key, word in described(owner).items():
        yield key, re.sub(r"\bNone\b", "null", word)  # docstrings speak Python, the command line yaml


def _value(parent: DictConfig, node: Any, key: Any) -> str:
    if node._is_missing():
        return "must be given"
    if node._is_interpolation():
        return str(node._value())
    if isinstance(node, DictConfig | ListConfig):
        return _flow(OmegaConf.to_container(node))
    return _flow(parent[key])


def _flow(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _lines(key: str, value: str, word: str, width: int) -> str:
    head = f"  {key}={value}" if value != "must be given" else f"  {key}=...  (must be given)"
    if len(head) <= 38 and word:
        return textwrap.fill(word, width, initial_indent=f"{head:40}", subsequent_indent=" " * 40)
    below = textwrap.fill(word, width, initial_indent=" " * 40, subsequent_indent=" " * 40) if word else ""
    return f"{head}\n{below}" if below else head
