"""Whether what was read is a row, and in one line what is wrong with it: the types of `row`, checked by pydantic."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from attention_zoo.results import row as of
from attention_zoo.rules import shown

DRAWN: dict[str, tuple[Any, Any]] = {
    "speed": (of.SpeedRow, of.SpeedOk),
    "peer": (of.PeerRow, of.Common),
    "budget": (of.BudgetRow, of.BudgetOk),
    "quality": (of.TrainingRow, of.TrainingOk),
    "portrait": (of.PortraitRow, of.PortraitOk),
}
"""Kind -> its type, and what one that ended well must hold beside. One without figures needs its description alone."""

KEPT: dict[str, tuple[tuple[Any, ...], Any]] = {
    "speed": ((of.KeptCell, of.SpeedRow), of.SpeedOk),
    "peer": ((of.KeptMeasured,), of.Kept),
    "budget": ((of.KeptMeasured,), of.Kept),
    "quality": ((of.KeptTraining,), of.KeptTrainingOk),
}
"""Kind -> what each must be, and what one that ended well must hold beside, to stand for its work in a later call."""


def wrong_with(row: of.Row) -> str | None:
    """What keeps a row from being drawn, in one line; None for a row that is as it should be."""
    if (wrong := _wrong(row, of.Common)) is not None:
        return wrong
    kind, ok = DRAWN[row["kind"]]
    return _wrong(row, kind, *([ok] if row["status"] == "ok" else []))


def wrong_to_keep(row: of.Row, kind: str) -> str | None:
    """What keeps the row of a file from standing for the work that it is of, in one line; None where it stands.

    Args:
        kind: that it must be of.
    """
    if row.get("kind") != kind:
        return f"kind must be {kind}, got {shown(row.get('kind'))}"
    always, ok = KEPT[kind]
    return _wrong(row, *always) or _wrong(row, ok if row["status"] == "ok" else of.KeptFailed)


def _wrong(row: of.Row, *kinds: Any) -> str | None:
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
