"""What a result row is: one type for each kind, which who makes rows fills and who reads them is checked against.

| kind | is of | made by, and by nothing else |
|---|---|---|
| speed | one cell of a benchmark | `measure.cell.blank_row` |
| peer | ours against one implementation of others | `measure.peers.contest` |
| budget | the longest length within a memory | `measure.budget` |
| quality | one training | `training.records` |
| portrait | what each token sees | `report.patterns` |
| published | a figure of somebody's paper | `jobs.published` |

A row is a plain dict and one line of JSON. Keys that may be missing (`NotRequired`) are in every new row, but not in
each of older versions, or of work that ended early; keys that are not named here may hold anything: rows of newer
versions are drawn. The annotations are pydantic's, see `check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, with_config
from typing_extensions import TypedDict

Row = Mapping[str, Any]
"""A row of any kind, to be read."""

# Strict: a figure written as text, a truth value for a number or a list for a mapping is a damaged row, no other form.
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

Kind = Literal["speed", "peer", "budget", "quality", "portrait", "published"]
Status = Literal["ok", "unsupported", "oom", "oom_predicted", "timeout", "failed", "lost", "missing"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Words = Annotated[str, StringConstraints(max_length=100_000)]
Count = Annotated[int, Field(ge=0, le=2**60)]
Total = Annotated[int, Field(ge=0, le=10**18)]
Positive = Annotated[int, Field(ge=1, le=2**60)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Above = Annotated[float, Field(gt=1e-18, le=1e18)]
"""No call takes less time."""
Curve = list[Annotated[list[Number], Field(min_length=2, max_length=2)]]
Groups = list[Annotated[list[Number], Field(min_length=4, max_length=4)]]
"""Of scored answers: which, their accuracy, loss in nats and number."""
Readings = list[Annotated[list[Number], Field(min_length=2)]]
"""[step, number, ...] of what a part of the model says of itself, a number for each head."""
Nested = dict[str, Any]


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
    """Where a row was made; see `measure.environment`."""

    cpu: NotRequired[Words | None]
    cores: NotRequired[Count | None]
    threads: NotRequired[Count | None]
    wait_policy: NotRequired[Words | None]
    spin_count: NotRequired[Words | None]
    memory_bytes: NotRequired[Count | None]
    torch: NotRequired[Words | None]
    python: NotRequired[Words | None]
    platform: NotRequired[Words | None]
    package: NotRequired[Words | None]
    source: NotRequired[Words | None]
    cuda: NotRequired[Any]
    processes: NotRequired[Count]
    """That shared the work; one where it is not said."""


@with_config(STRICT)
class Common(TypedDict):
    """What every row holds."""

    kind: Kind
    backend: Name
    status: Status
    error: NotRequired[Words | None]
    id: NotRequired[Name | None]
    environment: NotRequired[Environment | None]
    config: NotRequired[Nested | None]


# --- measured --------------------------------------------------------------------------------------------------------


@with_config(STRICT)
class Call(TypedDict):
    """A call that was, or should have been, measured; all but its length."""

    kernel: NotRequired[Name | None]
    batch: Positive
    heads: Positive
    head_width: Positive
    causal: bool
    variant: Name
    phase: Name
    device: Name
    dtype: Name
    threads: Positive | None
    dim: NotRequired[Positive | None]


@with_config(STRICT)
class Figures(TypedDict):
    """What a cell came to; all None where it did not finish."""

    seconds: NotRequired[Above | None]
    seconds_min: NotRequired[Amount | None]
    seconds_max: NotRequired[Amount | None]
    repeats: NotRequired[Count | None]
    warmup: NotRequired[Count | None]
    cpu_seconds: NotRequired[Amount | None]
    tokens_per_second: NotRequired[Amount | None]
    peak_bytes: NotRequired[Count | None]
    reserved_bytes: NotRequired[Count | None]
    resident_bytes: NotRequired[Count | None]
    peak_method: NotRequired[Words | None]
    held_bytes: NotRequired[Count | None]
    predicted_bytes: NotRequired[Count | None]
    state_bytes: NotRequired[Count | None]
    flops: NotRequired[Total | None]
    floor_flops: NotRequired[Total | None]
    matmul_flops_per_second: NotRequired[Amount | None]
    floor_ratio: NotRequired[Amount | None]
    trace: NotRequired[Words | None]


def no_figures() -> Figures:
    """Of what did not finish, or not yet."""
    return cast(Figures, dict.fromkeys(Figures.__annotations__))


@with_config(STRICT)
class Limits(TypedDict):
    """Under which a cell ran; None: without."""

    timeout_s: Number | None
    memory_limit_bytes: Number | None


@with_config(STRICT)
class SpeedRow(Common, Call, Figures):
    """One cell."""

    length: Positive
    wall_seconds: NotRequired[Number | None]
    limits: NotRequired[Limits | None]


@with_config(STRICT)
class Agreement(TypedDict):
    """How closely a peer computes the same."""

    output: Number
    gradient: Number
    bound: NotRequired[Number]
    on: Words


@with_config(STRICT)
class Ours(TypedDict):
    """What our side of a contest came to."""

    seconds: NotRequired[Above | None]
    seconds_min: NotRequired[Amount | None]
    seconds_max: NotRequired[Amount | None]
    cpu_seconds: NotRequired[Amount | None]
    peak_bytes: NotRequired[Count | None]
    resident_bytes: NotRequired[Count | None]
    peak_method: NotRequired[Words | None]


@with_config(STRICT)
class Theirs(TypedDict):
    """What the other side came to."""

    their_seconds: NotRequired[Above | None]
    their_seconds_min: NotRequired[Amount | None]
    their_seconds_max: NotRequired[Amount | None]
    their_cpu_seconds: NotRequired[Amount | None]
    their_peak_bytes: NotRequired[Count | None]
    their_resident_bytes: NotRequired[Count | None]
    their_peak_method: NotRequired[Words | None]


@with_config(STRICT)
class PeerRow(Common, Call, Ours, Theirs):
    """One of ours against one implementation of others. Ratios are theirs over ours."""

    length: Positive
    against: Name
    title: Name
    fair: NotRequired[Words | None]
    rounds: NotRequired[Count | None]
    time_ratio: NotRequired[Above | None]
    time_ratio_min: NotRequired[Above | None]
    time_ratio_max: NotRequired[Above | None]
    cpu_time_ratio: NotRequired[Above | None]
    memory_ratio: NotRequired[Above | None]
    resident_ratio: NotRequired[Above | None]
    floor_flops: NotRequired[Amount | None]
    floor_ratio: NotRequired[Amount | None]
    matmul_flops_per_second: NotRequired[Amount | None]
    agreement: NotRequired[Agreement | None]
    versions: NotRequired[Nested | None]


@with_config(STRICT)
class Tried(TypedDict):
    """A length that a budget was tried with."""

    length: Positive
    status: NotRequired[Status]
    error: NotRequired[Words | None]
    seconds: NotRequired[Amount | None]
    resident_bytes: NotRequired[Count | None]
    held_bytes: NotRequired[Count | None]


@with_config(STRICT)
class BudgetRow(Common, Call):
    """The longest length that trains within a memory.

    Keys that need a word:
        points: [length, bytes] that the law was fitted to.
        fit: the law, see `measure.budget.Fit`.
    """

    budget_bytes: Positive
    length: NotRequired[Positive | None]
    verified: NotRequired[bool | None]
    not_verified: NotRequired[Words | None]
    fits: NotRequired[Tried | None]
    fails: NotRequired[Tried | None]
    points: NotRequired[list[list[Any]] | None]
    bytes_per_token: NotRequired[Amount | None]
    fit: NotRequired[Nested | None]


# --- trained ---------------------------------------------------------------------------------------------------------


@with_config(STRICT)
class OfSet(TypedDict):
    """How long the rows of an evaluation set are, what it says by groups and by position, how many rows it has, and the
    95 % interval of the main metric over such rows, see `statistics.resampled`; None where there is none."""

    seq_len: NotRequired[Count | None]
    by_group: NotRequired[dict[str, Groups] | None]
    loss_by_position: NotRequired[Curve | None]
    rows: NotRequired[Count | None]
    interval: NotRequired[Annotated[list[Number], Field(min_length=2, max_length=2)] | None]


@with_config(STRICT)
class Trained(TypedDict):
    """What a training came to."""

    steps: NotRequired[Count | None]
    parameters: NotRequired[Count | None]
    train_seconds: NotRequired[Amount | None]
    wall_seconds: NotRequired[Amount | None]
    scoring_seconds: NotRequired[Amount | None]
    step_seconds: NotRequired[Amount | None]
    tokens_per_second: NotRequired[Amount | None]
    peak_bytes: NotRequired[Count | None]
    sent_bytes_per_token: NotRequired[Amount | None]
    curve: NotRequired[Curve | None]
    quality_curve: NotRequired[Curve | None]
    readings: NotRequired[dict[str, Readings] | None]
    metrics: NotRequired[Scores | None]
    evaluations: NotRequired[dict[str, Scores] | None]
    loss_by_position: NotRequired[Curve | None]
    metric: NotRequired[Name | None]
    better: NotRequired[Literal["higher", "lower"] | None]
    by_group: NotRequired[dict[str, Groups] | None]
    by_set: NotRequired[dict[str, OfSet] | None]
    evaluation_tokens_per_second: NotRequired[Amount | None]
    chance: NotRequired[Number | None]
    baselines: NotRequired[dict[str, Number] | None]
    further_baselines: NotRequired[dict[str, dict[str, Number]] | None]
    carries_state: NotRequired[bool | None]
    stopped: NotRequired[Words | None]
    model_sha256: NotRequired[Words | None]


@with_config(STRICT)
class Given(TypedDict):
    """What the backend was given, see `measure.given.given_to`; and its options that are not the defaults."""

    positions: NotRequired[Words | None]
    length: NotRequired[Positive | None]
    keys_mean: NotRequired[Amount | None]
    keys_most: NotRequired[Amount | None]
    layer_reach: NotRequired[Count | None]
    reach: NotRequired[Count | None]
    state_bytes: NotRequired[Count | None]
    flops_per_token: NotRequired[Amount | None]
    options: NotRequired[Nested | None]


@with_config(STRICT)
class Rates(TypedDict):
    """Learning rates that were tried for a backend before its runs, with one seed each, and which was the best."""

    tried: list[Amount]
    chosen: Amount
    judged_on: Words


@with_config(STRICT)
class TrainingRow(Common, Trained):
    """One training.

    Keys that need a word:
        train_seconds, wall_seconds: in steps alone; evaluations of the main set included.
        scoring_seconds: of all that is scored once, at the end: further sets, and those of `evaluate_at`.
        model_sha256: of model.safetensors, by which a later call knows that it is still whole.
        final: False where something in the run's surroundings failed (its folder, the disk), so that the next call
            tries again.
        refused: True where the config cannot be meant: nothing was begun, and another try ends alike.
        notices: what went otherwise than asked and did not end the run.
        data: what the task says of its data.
        regime: what was made equal for all backends of the comparison: steps, flops, seconds, parameters or keys.
        rates: of the learning rate; None where it was not chosen among several.
    """

    final: NotRequired[bool | None]
    refused: NotRequired[bool | None]
    notices: NotRequired[list[Words] | None]
    task: NotRequired[Name | None]
    seed: NotRequired[int | None]
    seq_len: NotRequired[Positive | None]
    batch: NotRequired[Positive | None]
    resumed_at: NotRequired[Count | None]
    data: NotRequired[Nested | None]
    given: NotRequired[Given | None]
    regime: NotRequired[Words | None]
    rates: NotRequired[Rates | None]


# --- seen ------------------------------------------------------------------------------------------------------------


@with_config(STRICT)
class PortraitRow(Common):
    """What each token sees: [query][key], a digit for each pair (see `report.patterns`)."""

    length: NotRequired[Positive | None]
    abilities: NotRequired[Nested | None]
    pairs: NotRequired[Pairs | None]


# --- published -------------------------------------------------------------------------------------------------------


@with_config(STRICT)
class PublishedRow(Common):
    """A figure of a published table, which ours stand beside.

    Keys that need a word:
        table, source: its title, and where it was published.
        set: the evaluation set of our trainings that it is compared with.
        value: None where nothing was published.
        remark: in what ours differ.
    """

    table: Words
    source: Words
    task: Name
    set: Name
    value: Number | None
    metric: NotRequired[Name | None]
    seq_len: NotRequired[Positive | None]
    remark: NotRequired[Words | None]
