"""One value and its rule: what an annotation allows, checked by pydantic, and said in words.

The types of `options` are such annotations. `at_least`, `one_of` and their like are for what no constructor's
annotation can say: values that come with a call, and options that depend on another one.
"""

from __future__ import annotations

import difflib
import functools
import math
import reprlib
import types
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
from pydantic import BeforeValidator, Strict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema


class OneOf:
    """Annotation: one of these words (or values)."""

    def __init__(self, *allowed: Any):
        self.allowed = allowed

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.allowed))


class Rule(NamedTuple):
    """How one option is checked.

    Fields:
        adapter: pydantic's; None where the annotation says nothing about plain values.
        hint: the annotation.
        title: what the option is called in messages; None: its name.
    """

    adapter: TypeAdapter[Any] | None
    hint: Any
    title: str | None

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError that names the option, the rule and the value."""
        if self.adapter is None:
            return
        try:
            self.adapter.validate_python(value.item() if isinstance(value, np.floating) else value)
        except ValidationError as error:
            rule = self._rule(error.errors(include_url=False))
        except RecursionError:
            rule = describe(self.hint, ranged=False)
        else:
            return
        raise ValueError(f"{self.title or name} must be {rule}, got {shown(value)}")

    def _rule(self, errors: Sequence[Any]) -> str:
        kinds = {error["type"] for error in errors}
        ranged = any(kind.startswith(("greater_than", "less_than", "finite")) for kind in kinds)
        # NaN is also what no upper bound holds for
        endless = any(isinstance(error["input"], float) and not math.isfinite(error["input"]) for error in errors)
        words = describe(self.hint, ranged=ranged, finite=endless)
        for error in errors:
            if error["type"] == "less_than_equal" and not endless:
                most = error["ctx"]["le"]
                most = f"{most:.15g}" if isinstance(most, float) else str(most)
                if most not in words:
                    return f"at most {most}"
        return words


def rule_of(hint: Any) -> Rule:
    """The rule that an annotation stands for."""
    strict = _strict(hint)
    title = next((info.title for info in _infos(hint) if info.title), None)
    return Rule(None if strict is None else TypeAdapter(strict), hint, title)


SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
HOLDERS = (list, tuple, dict, Sequence, Mapping)


def _strict(hint: Any) -> Any:
    """The annotation with strict scalars and tolerant containers (a yaml's list for a tuple); None: not for us."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        return type(None)
    if hint is float:
        return Annotated[float, Strict(), BeforeValidator(_no_vast_integer)]
    if any(hint is scalar for scalar in SCALARS):
        return Annotated[hint, Strict()]
    if hint is Any or hint is Ellipsis or origin is Literal or hint in HOLDERS:
        return hint
    if origin is Annotated:
        inner = args[0] if any(isinstance(each, OneOf) for each in hint.__metadata__) else _strict(args[0])
        return None if inner is None else Annotated[(inner, *hint.__metadata__)]
    members = tuple(_strict(arg) for arg in args)
    if not members or any(member is None for member in members):
        return None
    if origin in (Union, types.UnionType):
        return Union[members]  # noqa: UP007 - made at run time
    return origin[members] if origin in HOLDERS else None


def _no_vast_integer(value: Any) -> Any:
    """A whole number stands for a float only where it is one: torch cannot take 10**30 as it is."""
    if type(value) is int and abs(value) > 2**53:
        raise ValueError
    if not isinstance(value, int | float | np.integer):
        raise ValueError  # a fraction or decimal, which pydantic takes, but torch does not
    return value


def _infos(hint: Any) -> list[FieldInfo]:
    """pydantic's `Field`s at the top of an annotation, and at the top of the members of a union."""
    if get_origin(hint) is Annotated:
        own = [each for each in hint.__metadata__ if isinstance(each, FieldInfo)]
        return own + _infos(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [info for member in get_args(hint) for info in _infos(member)]
    return []


def describe(hint: Any, *, ranged: bool = True, finite: bool = False) -> str:
    """What an annotation asks for, in words.

    Args:
        ranged: whether the value was outside of a range, which a number's own description then stands for.
        finite: whether it was NaN or infinite.
    """
    origin, args = get_origin(hint), get_args(hint)
    again = functools.partial(describe, ranged=ranged, finite=finite)
    if origin is Annotated:
        bounds = [each for info in _infos(hint) for each in info.metadata]
        for each in hint.__metadata__:
            text = each.description if isinstance(each, FieldInfo) else None
            if text and (ranged or args[0] not in (int, float) or text.startswith(("a ", "an "))):
                bounded = any(hasattr(bound, key) for bound in bounds for key in ("le", "lt"))
                return f"{text}, and finite" if finite and not bounded else text
        for each in hint.__metadata__:
            if isinstance(each, OneOf):
                return f"one of {', '.join(map(str, each.allowed))}"
        words = {"ge": "of at least", "gt": "above", "lt": "below"}
        said = [f"{word} {getattr(b, key)}" for b in bounds for key, word in words.items() if hasattr(b, key)]
        return " ".join([again(args[0]), " and ".join(said)]).strip()
    if origin in (Union, types.UnionType):
        return ", or ".join(again(member) for member in args if member is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    holder = origin or hint
    if holder in (dict, Mapping):
        return "a mapping"
    if holder in HOLDERS:
        return f"a list, each entry {again(args[0])}" if args and args[0] is not Any else "a list"
    return "a finite number" if hint is float and finite else SCALARS.get(hint, str(hint))


def shown(value: Any, most: int = 100) -> str:
    """A value in one line of bounded length, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    try:
        return " ".join(short.repr(value).split())[: 3 * most]
    except (ValueError, RecursionError):  # a whole number of thousands of digits is not written out
        digits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"{type(value).__name__}{digits}"


def near(word: str, known: Collection[str]) -> str:
    """The hint at the nearest known word, for the end of a message."""
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def at_least(least: int, **options: int) -> None:
    """Raise a ValueError that names the option, the rule and the value."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")


def one_of(allowed: tuple[str, ...], **options: str) -> None:
    """Raise a ValueError that names the option, what is allowed and the value."""
    for name, value in options.items():
        if not (isinstance(value, str) and value in allowed):
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def named(option: str, value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a component that is given by one word, or as a mapping `{"name": ..., <options>}`.

    Raises:
        ValueError: for a mapping without a name, or anything else.
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return value["name"], {key: option for key, option in value.items() if key != "name"}
    raise ValueError(f"{option} must be a word, or a mapping with a name and options, got {shown(value)}")


def known_options(option: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise a ValueError that names an option which the component does not have, and those that it has."""
    for key in given:
        if key not in known:
            raise ValueError(f"{option} has no option {key}; it has {', '.join(sorted(known)) or 'none'}")


class Unsupported(ValueError):
    """A mechanism was asked for something that it does not declare. Raised at build, never silently ignored."""

    def __init__(self, backend: str, option: str, reason: str, instead: str):
        option = " ".join(option.split())[:300]  # it may quote a value, whatever that holds
        super().__init__(f"{backend}: {option} is not supported: {reason}; use {instead} instead")
        self.backend, self.option, self.reason, self.instead = backend, option, reason, instead


LARGEST_SCALE = 10_000.0
"""Of scores; beyond, float32 could not tell the scores of ordinary vectors apart."""


def check_scale(scale: float) -> None:
    """Raise a ValueError unless this is a factor on q·k that softmax can work with, of either sign: at a call."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(scale) <= LARGEST_SCALE:
        raise ValueError(f"scale must be a number from {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}, got {shown(scale)}")
