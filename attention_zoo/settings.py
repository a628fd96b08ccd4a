"""Where configs of Hydra become plain values: the one boundary, for every command.

What cannot be resolved, is still to be given, is no finite number or has the wrong type is refused here, by its full
key, in one line and before anything runs. Types and ranges are the annotations of the schemas; see `options`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from attention_zoo.options import check_fields
from attention_zoo.rules import near, shown

LIBRARIES = ("hydra.", "omegaconf.")
MANY = "an override is written key=value, with quotes around a value that holds = , [ ] { } or $"


def plain_values(config: Any) -> dict[str, Any]:
    """A config as nested dicts, lists and scalars, all interpolations resolved.

    Raises:
        ValueError: for an interpolation that leads nowhere, a value still to be given (???) or a number that is not
            finite, by its full key.
    """
    try:
        found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    finite(found)
    return found


def settings(config: DictConfig) -> Any:
    """An instance of the dataclass that a config's schema is, with the types and ranges of all its fields checked.

    Raises:
        ValueError: as `plain_values`, and for a value outside of its field's rule.
    """
    plain_values(config)
    _known_keys(config)
    found: Any = OmegaConf.to_object(config)
    check_fields(type(found), found)
    return found


def _known_keys(config: Any, prefix: str = "") -> None:
    """Raise a ValueError for a key that no field stands for: `+key=value` may add anything, and nobody reads it."""
    kind = OmegaConf.get_type(config)
    known = [each.name for each in fields(kind)] if is_dataclass(kind) else list(config)
    for key in config:
        if key not in known:
            raise ValueError(f"{prefix}{key} is no known option{near(str(key), known)}; known: {', '.join(known)}")
        if isinstance(inner := config[key], DictConfig):
            _known_keys(inner, f"{prefix}{key}.")


def finite(value: Any, key: str = "") -> None:
    """Raise a ValueError, by its full key, for the first number in a nest of values that is NaN, infinite or larger
    than any float."""
    for place, number in _numbers(value, key):
        if isinstance(number, int) and number.bit_length() > 1000:
            raise ValueError(f"{place} must be a number below 1e+300, got {shown(number)}")
        if not math.isfinite(number):
            raise ValueError(f"{place} must be a finite number, got {number}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float | int]]:
    if isinstance(value, float | int):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
            if isinstance(name, float):
                yield f"{key}: the key {name}", name
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{key}[{index}]")


def one_line(error: BaseException, overrides: Sequence[str] = ()) -> str | None:
    """What Hydra or OmegaConf complain about, in one line that names field, rule and value; None for other errors.

    Args:
        overrides: those of the command line; the line ends in them where nothing else says which is meant.
    """
    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    line = _line(chain)
    return None if line is None else said_of(line, overrides)


def said_of(line: str, overrides: Sequence[str]) -> str:
    """The line; with the overrides behind it where none of them is named in it."""
    line = line.removeprefix("_dummy_: ")  # what Hydra calls a group whose choice it cannot read
    if not overrides or any(override.partition("=")[0].lstrip("+~") in line for override in overrides):
        return line
    return f"{line} (from {shown(' '.join(overrides))})"


def _line(chain: list[Any]) -> str | None:
    for found in chain:
        missing = getattr(found, "missing_cfg_file", None)
        if missing:
            group, _, name = missing.rpartition("/")
            options = sorted(found.options or ())
            return f"{group or 'config'} must be one of {', '.join(options)}, got {name!r}{near(name, options)}"
    for found in chain:
        key = getattr(found, "full_key", None)
        if isinstance(found, MissingMandatoryValue) and key:
            return f"{key} must be given, got ???"
        if isinstance(found, InterpolationKeyError | InterpolationResolutionError | UnsupportedInterpolationType):
            return f"{key or 'config'}: {_first(found)}"
    # an inner OmegaConf error may still hold the places where the outer one has the value
    ours = [e for e in chain if type(e).__module__.startswith(LIBRARIES) and not re.search(r"\$[A-Z_]+", _first(e))]
    if not ours:
        return _first(chain[0]) if _raised_by(chain[0]).startswith(LIBRARIES) else None
    deepest = ours[-1]
    lines = [line.strip() for line in str(deepest).splitlines()]
    place = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    text = _first(deepest)
    if "is not in struct" in text or "not in '" in text:
        parent = getattr(deepest, "parent_node", None)
        keys = [str(key) for key in parent] if isinstance(parent, Mapping) else []
        options = [key for key in keys if key != "hydra" and not key.startswith("_")]
        key = place.rpartition(".")[2] or text
        listed = f"; known: {', '.join(options)}" if options else ""
        return f"{place or text} is no known option{near(key, options)}{listed}"
    first = _first(chain[0])
    if (override := getattr(chain[0], "override", None)) is not None:
        return f"Error parsing override {shown(override)}: {text}; {MANY}"
    given = re.search(r"[\w.@+~]+=\S*", first)
    where = f"{place}: " if place and place not in text else ""
    return f"{where}{text}" + (f" (from {given.group()})" if given and given.group() not in text else "")


def _raised_by(error: BaseException) -> str:
    """The module of the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
