"""What a result row must hold before it may be drawn: one type for each kind of row, and the words for what is wrong.

Keys that are not named here may be there or not and hold anything: rows of older and of newer versions are drawn. A row
without figures (whatever ended it) needs its description alone.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

# Strict: a figure written as text, a truth value for a number or a list for a mapping is a damaged row, no other form.
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

Status = Literal["ok", "unsupported", "oom", "oom_predicted", "timeout", "failed", "lost", "missing"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Words = Annotated[str, StringConstraints(max_length=100_000)]
Count = Annotated[int, Field(ge=0, le=2**60)]
Positive = Annotated[int, Field(ge=1, le=2**60)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Above = Annotated[float, Field(gt=1e-18, le=1e18)]
Curve = list[Annotated[list[Number], Field(min_length=2, max_length=2)]]
Mapping = dict[str, Any]


def _scores(found: dict[str, float]) -> dict[str, float]:
    for name, most in (("accuracy", 1.0), ("bits_per_byte", 1e6)):
        if not 0 <= found.get(name, 0.0) <= most:
            raise ValueError(f"{name} must be between 0 and {most:g}")
    return found


def _square(pairs: list[str]) -> list[str]:
    if any(len(line) != len(pairs) for line in pairs):
        raise ValueError("must be a square of digits")
    return pairs


Scores = Annotated[dict[str, Number], AfterValidator(_scores)]
Pairs = Annotated[
    list[Annotated[str, StringConstraints(pattern=r"^[012]+$")]],
    Field(min_length=1, max_length=4096),
    AfterValidator(_square),
]


@with_config(STRICT)
class Environment(TypedDict):
    """Where a row was made."""

    cpu: NotRequired[Words | None]
    torch: NotRequired[Words | None]
    source: NotRequired[Words | None]
    cuda: NotRequired[Any]


@with_config(STRICT)
class Common(TypedDict):
    """What every row holds."""

    kind: Literal["speed", "peer", "budget", "quality", "portrait"]
    backend: Name
    status: Status
    error: NotRequired[Words | None]
    id: NotRequired[Name | None]
    environment: NotRequired[Environment | None]
    config: NotRequired[Mapping | None]


@with_config(STRICT)
class Call(Common):
    """A call that was, or should have been, measured."""

    variant: Name
    phase: Name
    device: Name
    dtype: Name
    causal: bool
    batch: Positive
    heads: Positive
    head_width: Positive
    threads: Positive | None
    kernel: NotRequired[Name | None]


@with_config(STRICT)
class Speed(Call):
    """One cell."""

    length: Positive
    seconds: NotRequired[Above | None]
    seconds_min: NotRequired[Amount | None]
    seconds_max: NotRequired[Amount | None]
    repeats: NotRequired[Count | None]
    warmup: NotRequired[Count | None]
    tokens_per_second: NotRequired[Amount | None]
    peak_bytes: NotRequired[Count | None]
    predicted_bytes: NotRequired[Count | None]
    resident_bytes: NotRequired[Count | None]
    state_bytes: NotRequired[Count | None]
    peak_method: NotRequired[Words | None]
    floor_ratio: NotRequired[Amount | None]


@with_config(STRICT)
class SpeedFigures(TypedDict):
    """What a cell that was measured holds."""

    seconds: Above


@with_config(STRICT)
class Agreement(TypedDict):
    """How closely a peer computes the same."""

    output: Number
    gradient: Number
    on: Words


@with_config(STRICT)
class Peer(Call):
    """One of ours against one implementation of others."""

    length: Positive
    against: Name
    title: Name
    fair: NotRequired[Words | None]
    agreement: NotRequired[Agreement | None]
    versions: NotRequired[Mapping | None]
    time_ratio: NotRequired[Above | None]
    time_ratio_min: NotRequired[Above | None]
    time_ratio_max: NotRequired[Above | None]
    cpu_time_ratio: NotRequired[Above | None]
    memory_ratio: NotRequired[Above | None]
    resident_ratio: NotRequired[Above | None]
    floor_ratio: NotRequired[Amount | None]
    floor_flops: NotRequired[Amount | None]
    seconds: NotRequired[Above | None]
    their_seconds: NotRequired[Above | None]
    peak_bytes: NotRequired[Count | None]
    their_peak_bytes: NotRequired[Count | None]


@with_config(STRICT)
class Tried(TypedDict):
    """A length that a budget was tried with."""

    length: Positive


@with_config(STRICT)
class Budget(Call):
    """The longest length within a memory."""

    budget_bytes: Positive
    length: NotRequired[Positive | None]
    verified: NotRequired[bool | None]
    not_verified: NotRequired[Words | None]
    bytes_per_token: NotRequired[Amount | None]
    fits: NotRequired[Tried | None]
    fails: NotRequired[Tried | None]


@with_config(STRICT)
class BudgetFigures(TypedDict):
    """What a length that was found holds."""

    length: Positive


@with_config(STRICT)
class Quality(Common):
    """One training."""

    task: NotRequired[Name | None]
    seed: NotRequired[int | None]
    seq_len: NotRequired[Positive | None]
    batch: NotRequired[Positive | None]
    steps: NotRequired[Count | None]
    parameters: NotRequired[Count | None]
    train_seconds: NotRequired[Amount | None]
    step_seconds: NotRequired[Amount | None]
    tokens_per_second: NotRequired[Amount | None]
    carries_state: NotRequired[bool | None]
    stopped: NotRequired[Words | None]
    data: NotRequired[Mapping | None]
    curve: NotRequired[Curve | None]
    quality_curve: NotRequired[Curve | None]
    loss_by_position: NotRequired[Curve | None]
    metrics: NotRequired[Scores | None]
    evaluations: NotRequired[dict[str, Scores] | None]


@with_config(STRICT)
class QualityFigures(TypedDict):
    """What a training that ended well holds."""

    task: Name
    seq_len: Positive
    steps: Count
    metrics: Annotated[Scores, Field(min_length=1)]


@with_config(STRICT)
class Portrait(Common):
    """What each token sees."""

    length: NotRequired[Positive | None]
    abilities: NotRequired[Mapping | None]
    pairs: NotRequired[Pairs | None]


@with_config(STRICT)
class PortraitFigures(TypedDict):
    """What a picture that was made holds."""

    abilities: Mapping
    pairs: Pairs


KINDS: dict[str, tuple[Any, Any]] = {
    "speed": (Speed, SpeedFigures),
    "peer": (Peer, None),
    "budget": (Budget, BudgetFigures),
    "quality": (Quality, QualityFigures),
    "portrait": (Portrait, PortraitFigures),
}
"""Kind -> its type, and what one that ended well must hold beside."""


def wrong_with(row: dict[str, Any]) -> str | None:
    """What keeps a row from being drawn, in one line; None for a row that is as it should be."""
    try:
        _adapter(Common).validate_python(row)
        described, figures = KINDS[row["kind"]]
        _adapter(described).validate_python(row)
        if figures is not None and row["status"] == "ok":
            _adapter(figures).validate_python(row)
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
    return f"{_place(error)}: {rule}, got {shown(error['input'])}"


def shown(value: Any, limit: int = 60) -> str:
    """A value in a sentence, cut where it is long."""
    try:
        said = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        said = f"a huge {type(value).__name__}"
    return said if len(said) <= limit else f"{said[: limit - 1]}…"
