"""What an option may be: types and ranges stand once, as annotations, and pydantic checks values against them.

    @checked
    def __init__(self, *, window: Positive = 256, wrap: Annotated[str, OneOf("row", "reference")] = "row"): ...

A wrong value is refused in one line that names the option, the rule and the value; an unknown option with the nearest
that there is. Attention mechanisms need no decorator: `contract.Attention` has those of its subclasses checked.
Values go on as they were given: nothing is converted, so that "3" is no number and True no 1.

Bare annotations (`int`, `float | None`, `list[str]`) are checked for their types. What is no plain value (a module, a
callable, an annotation that cannot be resolved) is left to the constructor.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, overload

from pydantic import Field
from torch import nn

from attention_zoo.room import Room
from attention_zoo.rules import SCALARS, Rule, near, rule_of, shown

LARGEST = 2**31 - 1
"""Of whole numbers where nothing sets an earlier limit: the product of two is still an index to torch."""

F = TypeVar("F", bound=Callable[..., Any])


class WrongOption(ValueError, TypeError):
    """An option that is unknown or missing. Both kinds of error: a wrong call is a TypeError to Python."""


Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Heads = Annotated[int, Field(ge=1, le=2**16)]
HeadWidth = Annotated[int, Field(ge=1, le=2**16)]
Chunk = Annotated[int, Field(ge=1, le=2048)]
Around = Annotated[int, Field(ge=0, le=1024)]
"""Chunks before or after the own one."""
Fill = Annotated[int, Field(ge=0, le=2**16)]
SegmentLength = Annotated[int, Field(ge=1, le=2**16)]
"""Tokens of a segment that is attended to as one block."""
Depth = Annotated[int, Field(ge=1, le=4096)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]
SeedOfRun = Annotated[int, Field(ge=0, le=2**62)]
Factor = Annotated[float, Field(ge=-10_000, le=10_000, description="a number from -10000 to 10000")]
"""On what goes through a softmax or a norm: beyond it products leave the range of half precision, then of any."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=10**9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a share between 0 and 1")]
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description="a probability below 1")]
Text = Annotated[str, Field(description="text")]
Named = Annotated[str | Mapping[str, Any], Field(description="a word, or a mapping with a name and options")]
"""A component by its name, or as a mapping `{"name": ..., <options>}`."""


class Call(NamedTuple):
    """What a function takes.

    Fields:
        rules: option -> how it is checked.
        defaults: option -> default, for those that have one.
        places: names of what may be given by position.
        open: whether further options go on to somebody else.
        many: whether further positions do.
    """

    rules: dict[str, Rule]
    defaults: dict[str, Any]
    places: tuple[str, ...]
    open: bool
    many: bool

    def check(self, given: Mapping[str, Any], prefix: str) -> None:
        """The types and ranges of what is known among `given`. A default is right by itself."""
        for name, value in given.items():
            if name in self.rules and not self._is_default(name, value):
                self.rules[name].check(prefix + name, value)

    def _is_default(self, name: str, value: Any) -> bool:
        default = self.defaults.get(name, inspect.Parameter.empty)
        plain = default is None or type(default) in SCALARS
        return plain and type(value) is type(default) and value == default


@functools.cache
def call_of(function: Callable[..., Any]) -> Call:
    """What one function takes; without the options that it hands on."""
    plain = inspect.unwrap(function)
    parameters = list(inspect.signature(plain).parameters.values())
    if plain.__name__ == "__init__":
        parameters = parameters[1:]
    kinds = {parameter.kind for parameter in parameters}
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return Call(
        {each.name: rule_of(_resolve(each.annotation, plain)) for each in named},
        {each.name: each.default for each in named if each.default is not each.empty},
        tuple(each.name for each in named if each.kind is not each.KEYWORD_ONLY),
        inspect.Parameter.VAR_KEYWORD in kinds,
        inspect.Parameter.VAR_POSITIONAL in kinds,
    )


def _resolve(annotation: Any, function: Callable[..., Any]) -> Any:
    """What an annotation stands for. One that names what is not there at run time says nothing."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except Exception:  # whatever it holds: a name for type checkers alone, a shape, another grammar
        return Any


def calls_of(target: Any) -> list[Call]:
    """Who takes the options of a class or function: its constructor, and those that this hands further ones to."""
    if not isinstance(target, type):
        return [call_of(target)]
    found: list[Call] = []
    for owner in target.__mro__:
        if isinstance(own := owner.__dict__.get("__init__"), types.FunctionType):
            found.append(call_of(own))
            if not found[-1].open:
                break
    return found


@overload
def checked(function: F) -> F: ...
@overload
def checked(function: None = None, *, prefix: str) -> Callable[[F], F]: ...
def checked(function: Any = None, *, prefix: str = "") -> Any:
    """Decorator of a constructor or function: its options are checked by their annotations, before its own code runs.

    Args:
        prefix: before the names of options in messages, such as "optimizer.".
    """
    if function is None:
        return lambda function: _checked(function, prefix)
    return _checked(function, prefix)


def _checked(function: Any, prefix: str) -> Any:
    if hasattr(function, "options_are_checked"):
        return function
    builds = function.__name__ == "__init__"

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        target: Any = type(args[0]) if builds else function
        _check_call(function, target, args[1:] if builds else args, options, prefix)
        if not builds or not issubclass(target, nn.Module) or not Room.counts():
            return function(*args, **options)
        with Room(_name(target), options):
            return function(*args, **options)

    wrapper.options_are_checked = True  # type: ignore[attr-defined]
    return wrapper


def _check_call(
    function: Callable[..., Any], target: Any, places: tuple[Any, ...], options: Mapping[str, Any], prefix: str
) -> None:
    call = call_of(function)
    if len(places) > len(call.places) and not call.many:
        raise WrongOption(f"{_name(target)} takes its options by name, got {shown(places[len(call.places)])} without")
    given = {**dict(zip(call.places, places)), **options}
    if not call.open:
        refuse_unknown(given, target, prefix, calls_of(target) or [call])
    for name in call.rules:
        if name not in given and name not in call.defaults:
            raise WrongOption(f"{prefix}{name} must be given to {_name(target)}")
    call.check(given, prefix)


def refuse_unknown(given: Mapping[str, Any], target: Any, prefix: str, calls: Sequence[Call]) -> None:
    """Raise for an option that nobody takes, with the nearest that there is."""
    known = [name for call in calls for name in call.rules]
    for name in given:
        if name not in known:
            listed = ", ".join(sorted(set(known))) or "none"
            raise WrongOption(
                f"{prefix}{name} is no option of {_name(target)}{near(str(name), known)}; it has {listed}"
            )


def check_target(target: Any, given: Mapping[str, Any], prefix: str = "") -> None:
    """Check some of the options of a class or function that is called later, with others beside them.

    Raises:
        ValueError: for an unknown one, or a value outside of its rule.
    """
    try:
        calls = calls_of(target)
    except (TypeError, ValueError):  # written in C: it has no signature that could be read
        return
    if calls and not calls[-1].open:
        refuse_unknown(given, target, prefix, calls)
    for call in calls:
        call.check(given, prefix)


def check_values(rules: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> None:
    """Check options against annotations by name; those without one are left alone."""
    for name, value in given.items():
        if name in rules:
            rule_of(rules[name]).check(prefix + name, value)


@functools.cache
def _field_rules(cls: type) -> dict[str, Rule]:
    scope = vars(sys.modules[cls.__module__])
    return {each.name: rule_of(eval(each.type, scope) if isinstance(each.type, str) else each.type)
            for each in fields(cls)}  # fmt: skip


def check_fields(cls: type, values: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass, and of dataclasses within, by their annotations.

    Args:
        cls: the dataclass.
        values: one of it, or a mapping with its keys.
        prefix: before the names of fields in messages.

    Raises:
        ValueError: for a value outside of its rule.
    """
    for name, rule in _field_rules(cls).items():
        value = values.get(name) if isinstance(values, Mapping) else getattr(values, name)
        inner = rule.hint if is_dataclass(rule.hint) else type(value)
        if is_dataclass(inner) and isinstance(inner, type):
            if not isinstance(value, inner | Mapping):
                raise ValueError(f"{prefix}{name} must be a mapping, got {shown(value)}")
            check_fields(inner, value, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            rule.check(prefix + name, value)
            for key, each in value.items():
                if is_dataclass(each) and not isinstance(each, type):
                    check_fields(type(each), each, f"{prefix}{name}.{key}.")
        else:
            rule.check(prefix + name, value)


def _name(target: Any) -> str:
    """What a class or function is called in messages: a mechanism or task by the word that chooses it."""
    name = getattr(target, "name", None)
    return name if isinstance(name, str) and name else getattr(target, "__name__", str(target))
