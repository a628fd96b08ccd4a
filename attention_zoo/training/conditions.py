"""Under which other conditions a trained model is scored, as conf/train.yaml says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from attention_zoo.options import Positive, Text, check_fields
from attention_zoo.rules import near, shown

SEPARATOR = "@"
"""Between the name of a set and that of the conditions it was scored under."""


@dataclass
class EvaluateAt:
    """One entry of `evaluate_at`; null: as in training.

    Fields:
        attention: options of the mechanism that differ, or another one of the same weights by `name`.
        seq_len: tokens of the rows.
        sets: the task's evaluation sets to score; null: that of the result.
    """

    attention: dict[str, Any] | None = None
    seq_len: Positive | None = None
    sets: list[Text] | None = None


def conditions(given: Mapping[str, Any]) -> dict[str, EvaluateAt]:
    """The entries, each checked.

    Raises:
        ValueError: naming the entry, the rule and the value.
    """
    found = {}
    for name, entry in given.items():
        where = f"evaluate_at.{name}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must be a mapping such as {{seq_len: 2048}}, got {shown(entry)}")
        known = [each.name for each in fields(EvaluateAt)]
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(
                f"{where}.{unknown[0]} is no option{near(str(unknown[0]), known)}; known: {', '.join(known)}"
            )
        made = EvaluateAt(**entry)
        check_fields(EvaluateAt, asdict(made), f"{where}.")
        if made.attention is None and made.seq_len is None:
            raise ValueError(f"{where} must say attention, seq_len or both, got neither")
        found[str(name)] = made
    return found
