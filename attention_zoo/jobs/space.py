"""What a search may change: fields of a training and the values that each may take.

space.optimizer.lr=[1e-4,1e-2,log]      numbers from 1e-4 to 1e-2, even in their logarithms
space.model.output_dropout=[0,0.3,uniform]
space.model.depth=[1,4,int]             whole numbers, both ends included; [16,256,int,log] evenly in logarithms
space.attention=[full,longformer]       anything else is a list of choices, of names, numbers, lists or mappings
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attention_zoo.rules import shown
from attention_zoo.training.config import compose_training
from attention_zoo.training.possible import impossible

if TYPE_CHECKING:
    import optuna

KINDS = ("log", "uniform", "int")
FORMS = "[low,high,log], [low,high,uniform], [low,high,int] or [low,high,int,log], or a list of choices"
FIXED = ("task", "tracker", "output", "device", "threads", "force", "retry", "backend")
"""Fields that are the same for all trials: what they are compared on, and what no result depends on."""
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+@-]*")
READ_OTHERWISE = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Dimension:
    """One field.

    Fields:
        key: as it is typed, such as optimizer.lr.
        choices: the words that it may be given; empty for a range.
        low, high: ends of a range, both included.
        integer: whether only whole numbers are meant.
        log: whether its logarithm is drawn evenly.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    integer: bool = False
    log: bool = False

    def suggest(self, trial: optuna.Trial) -> str:
        """The word that a trial gives the field."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.integer:
            return word_of(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return word_of(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def probes(self) -> tuple[str, ...]:
        """Words that show whether the field takes its values: all choices, or both ends."""
        return self.choices or (word_of(self.low), word_of(self.high))

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key} one of {', '.join(self.choices)}"
        kind = ", ".join(word for word, said in (("whole", self.integer), ("log", self.log)) if said)
        return f"{self.key} from {self.low:g} to {self.high:g}{f' ({kind})' if kind else ''}"


def word_of(value: Any) -> str:
    """A value as an override writes it, so that it is read back as the same."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in READ_OTHERWISE:
            return value
        # a backslash is one of its own unless a quote follows it
        return '"' + re.sub(r'(\\+)(?="|$)', r"\1\1", value).replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {word_of(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(word_of, value)) + "]"
    return repr(value)


def dimensions(space: Mapping[str, Any]) -> list[Dimension]:
    """The fields of a nested `space`.

    Raises:
        ValueError: naming the field, the rule and the value; none of this has looked at what is trained.
    """
    found = [_dimension(key, value) for key, value in _flat(space)]
    if not found:
        raise ValueError(f"space must name at least one field, such as 'space.optimizer.lr=[1e-4,1e-2,log]': {FORMS}")
    return found


def _flat(space: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    parts = [
        _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else [(f"{before}{key}", value)]
        for key, value in space.items()
    ]
    return [each for part in parts for each in part]


def _dimension(key: str, value: Any) -> Dimension:
    if (root := key.partition(".")[0]) in FIXED:
        raise ValueError(f"space.{key} cannot be searched: {root} is the same for all trials")
    if not isinstance(value, list) or not value:
        raise ValueError(f"space.{key} must be {FORMS}, got {shown(value)}")
    kinds = [each for each in value if isinstance(each, str) and each in KINDS]
    if not kinds:
        choices = tuple(map(word_of, value))
        if len(set(choices)) < max(2, len(choices)):
            raise ValueError(f"space.{key} must have two choices or more, all different, got {shown(value)}")
        return Dimension(key, choices)
    low, high, *said = value
    numbers = [each for each in (low, high) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < 2 or said != kinds or len(set(kinds)) < len(kinds) or {"log", "uniform"} <= set(kinds):
        raise ValueError(f"space.{key} must be {FORMS}, got {shown(value)}")
    if not low < high:
        raise ValueError(f"space.{key} must be a range whose first number is below its second, got {shown(value)}")
    if "log" in kinds and low <= 0:
        raise ValueError(f"space.{key} must be a range above 0 for log, got {shown(value)}")
    if "int" not in kinds:
        return Dimension(key, low=float(low), high=float(high), log="log" in kinds)
    if not float(low).is_integer() or not float(high).is_integer():
        raise ValueError(f"space.{key} must be a range of whole numbers for int, got {shown(value)}")
    return Dimension(key, low=int(low), high=int(high), integer=True, log="log" in kinds)


def check_space(
    given: Sequence[Dimension], words: Sequence[str], compose: Callable[[Sequence[str]], Any] = compose_training
) -> None:
    """Refuse a space in which some value cannot be trained with, before anything runs.

    A value is refused if it is with all other fields as they are given, and stays so whatever single other field of the
    space is changed. What only some combinations are refused for is found by their trials, whose reason is recorded.

    Args:
        words: of the command line, for the fields that are the same for all.

    Raises:
        ValueError: naming the field, the value and the rule.
    """
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    for each in given:
        if each.key in typed:
            raise ValueError(f"{each.key} is given and searched: leave {each.key}=... or space.{each.key}=... out")
    for each in given:
        for value in each.probes():
            first = _refused([f"{each.key}={value}"], words, compose)
            if first is None:
                continue
            others = [f"{other.key}={word}" for other in given if other is not each for word in other.probes()]
            if all(_refused([other, f"{each.key}={value}"], words, compose) is not None for other in others):
                hint = ""
                if not each.choices and not each.integer and "an integer" in first:
                    hint = f"; whole numbers are space.{each.key}=[{each.low:g},{each.high:g},int]"
                raise ValueError(f"space.{each.key} has {value}, which is refused: {first}{hint}")


def _refused(more: Sequence[str], words: Sequence[str], compose: Callable[[Sequence[str]], Any]) -> str | None:
    try:
        config = compose([*words, *more])
    except ValueError as error:
        return str(error)
    return impossible({"trial": config}).get("trial")
