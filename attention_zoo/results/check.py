"""Whether what was read is a row, and in one line what is wrong with it: the types of `row`, checked by pydantic."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from attention_zoo.results.row import (
    STRICT,
    Above,
    Amount,
    BudgetRow,
    Common,
    Count,
    Environment,
    Limits,
    Name,
    Nested,
    Number,
    Pairs,
    PeerRow,
    PortraitRow,
    Positive,
    PublishedRow,
    Row,
    Scores,
    SpeedRow,
    Status,
    TrainingRow,
)  # fmt: skip
from attention_zoo.rules import shown

# --- what a row that ended well must hold beside its type, to be drawn -----------------------------------------------


@with_config(STRICT)
class SpeedOk(TypedDict):
    """What a cell that was measured holds."""

    seconds: Above


@with_config(STRICT)
class BudgetOk(TypedDict):
    """What a length that was found holds."""

    length: Positive


@with_config(STRICT)
class TrainingOk(TypedDict):
    """What a training that ended well holds."""

    task: Name
    seq_len: Positive
    steps: Count
    metrics: Annotated[Scores, Field(min_length=1)]


@with_config(STRICT)
class PortraitOk(TypedDict):
    """What a picture that was made holds."""

    abilities: Nested
    pairs: Pairs


# --- what the file of a row must hold so that its work is not done again ---------------------------------------------


@with_config(STRICT)
class Kept(TypedDict):
    """What the file of a row must say so that its work is not done again."""

    backend: str
    status: Status
    error: NotRequired[str | None]
    config: Nested


@with_config(STRICT)
class KeptMeasured(Kept):
    """A measurement: by which code and on what machine."""

    id: Name
    environment: Environment


@with_config(STRICT)
class KeptCell(KeptMeasured):
    """A cell: under which limits, since those of today may be wider."""

    wall_seconds: Number
    limits: Limits


@with_config(STRICT)
class KeptTraining(Kept):
    """A training; one whose config could not even be read has no name."""

    id: Name | None


@with_config(STRICT)
class KeptTrainingOk(TypedDict):
    """What is shown of a training that is not done again. A score may be no number, for which JSON has a word only."""

    metrics: dict[str, float | str]
    steps: Count
    train_seconds: Amount


@with_config(STRICT)
class KeptFailed(TypedDict):
    """Whatever did not end well says why."""

    error: str


DRAWN: dict[str, tuple[Any, Any]] = {
    "speed": (SpeedRow, SpeedOk),
    "peer": (PeerRow, Common),
    "budget": (BudgetRow, BudgetOk),
    "quality": (TrainingRow, TrainingOk),
    "portrait": (PortraitRow, PortraitOk),
    "published": (PublishedRow, PublishedRow),
}
"""Kind -> its type, and what one that ended well must hold beside. One without figures needs its description alone."""

KEPT: dict[str, tuple[tuple[Any, ...], Any]] = {
    "speed": ((KeptCell, SpeedRow), SpeedOk),
    "peer": ((KeptMeasured,), Kept),
    "budget": ((KeptMeasured,), Kept),
    "quality": ((KeptTraining,), KeptTrainingOk),
}
"""Kind -> what each must be, and what one that ended well must hold beside, to stand for its work in a later call."""


def wrong_with(row: Row) -> str | None:
    """What keeps a row from being drawn, in one line; None for a row that is as it should be."""
    if (wrong := _wrong(row, Common)) is not None:
        return wrong
    kind, ok = DRAWN[row["kind"]]
    return _wrong(row, kind, *([ok] if row["status"] == "ok" else []))


def wrong_to_keep(row: Row, kind: str) -> str | None:
    """What keeps the row of a file from standing for the work that it is of, in one line; None where it stands.

    Args:
        kind: that it must be of.
    """
    if row.get("kind") != kind:
        return f"kind must be {kind}, got {shown(row.get('kind'))}"
    always, ok = KEPT[kind]
    return _wrong(row, *always) or _wrong(row, ok if row["status"] == "ok" else KeptFailed)


def _wrong(row: Row, *kinds: Any) -> str | None:
    """What is wrong by the first type that it does not fit."""
    for kind in kinds:
        try:
            _adapter(kind).validate_python(row)
        except ValidationError as error:
            found = error.errors(include_url=False)
            lacking = [_place(each) for each in found if each["type"] == "missing"]
            said = [f"lacks {', '.join(lacking)}"] if lacking else []
            said += [_words(each) for each in found if each["type"] != "missing"]
            return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")
    return None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _place(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])


def _words(error: Any) -> str:
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    rule = rule.replace("a valid integer", "an integer").replace("a valid ", "a ")
    return f"{_place(error)}: {rule}, got {shown(error['input'], 60)}"
