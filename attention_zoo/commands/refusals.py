"""What Hydra, OmegaConf and the importer refuse, in the words of whoever typed the command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import OverrideParseException

EXTRAS = {
    "sweep": ("hydra_plugins", "joblib", "submitit"),
    "ray": ("ray",),
    "search": ("optuna", "sqlalchemy"),
    "huggingface": ("transformers", "tokenizers"),
    "peers": ("reformer_pytorch", "local_attention", "memory_compressed_attention", "compressive_transformer_pytorch"),
}
"""Which extra of this package brings what is not there, by the name that is imported."""
LAUNCHERS = {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"}
"""Hydra's launchers, and which extra brings each."""


def of_hydra(error: BaseException) -> str | None:
    """What Hydra or OmegaConf complain about, in one line that says how to write it; None for other errors."""
    if not type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return None
    from attention_zoo.settings import one_line

    text = str(error)
    if given := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = given[1].partition("=")
        return f"{key} got several values, {values}: -m runs one after the other (-m {given[1]}); " \
               f"a list is written '{key}=[{values}]'"  # fmt: skip
    if given := re.match(r"Error merging override (([^=]*)=(.*))", text):
        if "is not a ListConfig" in str(error.__cause__):
            return f"{given[2]} must be a list, got {given[3]}: '{given[2]}=[{given[3]}]'"
        if "is not a DictConfig" in str(error.__cause__) or "to Dict" in str(error.__cause__):
            return f"{given[2]} must be a mapping, got {given[3]}: '{given[2]}={{name: value}}'"
    if (override := getattr(error, "override", None)) is not None:
        wrong = text.splitlines()[0]
        return (
            f"{override} is no override: {wrong}; write key=value, and in quotes what holds spaces, commas, brackets "
            "or a further =: 'key=\"a=b\"'"
        )
    if given := re.match(r"Could not override '([^']*)'\.\s*No match in the defaults list", text):
        return f"{given[1]} is no group of this command: --help lists its groups and their choices"
    missing = getattr(error, "missing_cfg_file", None)
    if missing and (launcher := str(missing).partition("hydra/launcher/")[2]) in LAUNCHERS:
        return f"hydra/launcher={launcher} needs pip install '{_extra(LAUNCHERS[launcher])}'"
    return one_line(error) or text.splitlines()[0]


def choices(overrides: Sequence[str]) -> None:
    """Raise a ValueError for a group of configs that is given anything but names: Hydra does not say which one."""
    parser = OverridesParser.create()
    for override in overrides:
        key, _, given = override.partition("=")
        if (folder := _folder(name := key.lstrip("+").partition("@")[0])) is None:
            continue
        try:
            value = parser.parse_override(override).value()
        except OverrideParseException:
            continue  # said by Hydra, as for any other
        if isinstance(value, Sweep):
            continue
        named = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) and "$" not in each for each in named):
            known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name[0] != "_")
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {given}; one option is {name}.OPTION={given}"
            )


def _folder(group: str) -> Any:
    """The folder of a group's choices; None for what is no group."""
    folder = files("attention_zoo.conf").joinpath(group)
    return folder if group.isidentifier() and folder.is_dir() else None


def of_sweep(line: str, overrides: Sequence[str]) -> str:
    """The line; or, where it is about an option of a group whose choice is swept, how such an option is written: Hydra
    looks it up in the default choice, before there are jobs."""
    parser = OverridesParser.create()
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        group = key.partition(".")[0]
        if group == key or override.startswith("++") or key not in line or _folder(group) is None:
            continue
        chosen = [other for other in overrides if other.partition("=")[0].lstrip("+") == group]
        if chosen and isinstance(parser.parse_override(chosen[-1]).value(), Sweep):
            word = override.lstrip("+")
            return f"{key} is looked up in the default {group} while {group} is swept: write ++{word}"
    return line


def missing_package(error: ImportError) -> str:
    """That a package is not there, and what to install."""
    text = " ".join(str(error).split())
    if "pip install" in text:
        return text
    root = (error.name or "").partition(".")[0]
    for extra, names in EXTRAS.items():
        if root in names:
            return f"{root} is not installed, or does not fit ({text}): pip install '{_extra(extra)}'"
    return f"{type(error).__name__}: {text}"


def _extra(name: str) -> str:
    return f"attention-zoo[{name}]"


def flags(words: Sequence[str]) -> list[str]:
    """The words of a command as Hydra's parser takes them in any order: overrides first, then flags with their values.

    Raises:
        ValueError: for a flag that Hydra does not have, one without its value or with one that it does not take; or a
            word without a key.
    """
    overrides, given, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.strip() or word.lstrip(" +~").startswith("="):
            raise ValueError(f"{word!r} is no override: write key=value")
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            shown = f"{name.lstrip('-')}={value or (rest[0] if rest else '...')}"
            raise ValueError(f"{name} is no flag; options are written without dashes: {shown}. --help lists them")
        given.append(word)
        values = FLAGS[name]
        if values is None and equals:
            raise ValueError(f"{name} takes no value, got {value!r}")
        if values is None or equals:
            continue
        if rest and (rest[0] in values or (not values and not rest[0].startswith("-"))):
            given.append(rest.pop(0))
        elif name not in ("--info", "-i"):
            got = rest[0] if rest else "nothing"
            raise ValueError(f"{name} must be followed by {' or '.join(values) or 'a value'}, got {got}")
    return [*overrides, *given]


_ANY: tuple[str, ...] = ()
_VALUES: dict[tuple[str, ...], tuple[str, ...] | None] = {
    ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"): None,
    ("--shell-completion", "-sc"): None,
    ("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"): _ANY,
    ("--experimental-rerun",): _ANY,
    ("--cfg", "-c"): ("job", "hydra", "all"),
    ("--info", "-i"): ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
FLAGS = {name: values for names, values in _VALUES.items() for name in names}
"""Hydra's flags, each with the words that it takes after it: none (None), any, or some."""
