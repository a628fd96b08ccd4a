"""How far each cell of a plan is, read from what lies in its place; nothing is asked of who works there.

| state | what lies there |
|---|---|
| done | a row that is "ok", of a trial that was pruned, or of a cell that was measured to its limits |
| failed | a row that says why not |
| running | somebody has a lock |
| lost | traces of somebody who is gone: the next call does it again by itself |
| waiting | nothing, or the checkpoint of who stopped in good order |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attention_zoo.files import Damaged, read_json, read_jsonl
from attention_zoo.jobs.plan import Planned
from attention_zoo.locks import CLAIMS, WRITES, owner
from attention_zoo.measure.kept import number
from attention_zoo.results.check import wrong_to_keep
from attention_zoo.results.row import Row
from attention_zoo.training.records import CHECKPOINT, METRICS, RESULT

Kind = Literal["done", "running", "failed", "lost", "waiting"]
KINDS: tuple[Kind, ...] = ("running", "lost", "failed", "waiting", "done")
MEASURED = ("ok", "oom", "oom_predicted", "timeout", "unsupported", "missing")
"""Statuses of a cell that was measured: running out of something is what it was measured for."""


@dataclass(frozen=True)
class State:
    """Of one cell.

    Fields:
        share: of its steps that are done, 0 to 1.
        left_s: seconds that it will still take, as far as one can tell.
        row: its result, where there is one.
        who: process and host that do it, where somebody does.
    """

    planned: Planned
    kind: Kind
    share: float
    left_s: float | None = None
    row: Row | None = None
    who: str = ""


def states(folder: str | Path, cells: Sequence[Planned]) -> list[State]:
    """How far all cells of a plan are.

    Args:
        folder: of the plan.
    """
    folder, found, measuring = Path(folder), list[State](), owner(folder) is not None
    for planned in cells:
        place = folder / planned.place
        if planned.kind == "training":
            found.append(_of_training(planned, place))
            continue
        state = _of_cell(planned, place)
        if state.kind == "waiting" and measuring:  # one after the other, in the order of the plan
            state, measuring = State(planned, "running", 0.0, planned.seconds, who=_who(owner(folder))), False
        found.append(state)
    return found


def remaining_s(found: Iterable[State], parallel: int) -> float | None:
    """Seconds until all are through with so many at a time; None where one cannot tell."""
    found = list(found)
    usual = _usual(found)
    left = [_left(state, usual) for state in found if state.kind not in ("done", "failed")]
    if any(each is None for each in left):
        return None
    known = [each for each in left if each is not None]
    return max(sum(known) / max(parallel, 1), max(known, default=0.0))


def _left(state: State, usual: dict[str, float]) -> float | None:
    if state.left_s is not None:
        return state.left_s
    seconds = state.planned.seconds if state.planned.seconds is not None else usual.get(state.planned.kind)
    return None if seconds is None else seconds * (1 - state.share)


def _usual(found: Iterable[State]) -> dict[str, float]:
    """What one cell of each kind took, of those that are through."""
    took: dict[str, list[float]] = {}
    for state in found:
        seconds = (state.row or {}).get("wall_seconds")
        if isinstance(seconds, int | float):
            took.setdefault(state.planned.kind, []).append(seconds)
    return {kind: sum(each) / len(each) for kind, each in took.items()}


def _of_training(planned: Planned, folder: Path) -> State:
    by = owner(folder) or owner(folder, CLAIMS)
    row = None if by else _row(folder / RESULT, "quality", planned.id)
    if row is not None and row["status"] != "lost":
        through = row["status"] == "ok" or row.get("stopped")  # by a search on purpose: no failure
        return State(planned, "done" if through else "failed", 1.0, 0.0, row)
    step, tokens_per_second = _progress(folder)
    steps, tokens = planned.steps or 0, planned.tokens or 0
    share = min(step / steps, 1.0) if steps else 0.0
    if by:
        left = (steps - step) * tokens / tokens_per_second if steps and tokens and tokens_per_second else None
        return State(planned, "running", share, left, who=_who(by))
    died = row is not None or any((folder / name).exists() for name in (WRITES.owner, CLAIMS.owner))
    saved = (folder / CHECKPOINT).exists()  # by who was asked to stop, and gave the folder back
    begun = died or (not saved and (folder / METRICS).exists())
    return State(planned, "lost" if begun else "waiting", share, row=row)


def _of_cell(planned: Planned, path: Path) -> State:
    row = _row(path, "peer" if planned.kind == "match" else "speed", planned.id)
    if row is None:
        return State(planned, "waiting", 0.0)
    if row["status"] == "lost":
        return State(planned, "lost", 0.0, row=row)
    return State(planned, "done" if row["status"] in MEASURED else "failed", 1.0, 0.0, row)


def _row(path: Path, kind: str, name: str | None) -> Row | None:
    """The row that counts; what cannot be read, or is of other code, is done again."""
    try:
        row = read_json(path)
    except (Damaged, FileNotFoundError):
        return None
    if wrong_to_keep(row, kind) is not None or (name is not None and row.get("id") != name):
        return None
    return row


def _progress(folder: Path) -> tuple[int, float]:
    """The last step of a training, and its tokens a second; 0 where there are none."""
    try:
        lines = list(_figures(folder / METRICS))
    except (FileNotFoundError, Damaged):
        return 0, 0.0
    return max((step for step, _ in lines), default=0), next((rate for _, rate in reversed(lines) if rate), 0.0)


def _figures(path: Path) -> Iterator[tuple[int, float]]:
    for line in read_jsonl(path):
        if number(line.get("step")):
            rate = line.get("train/tokens_per_second")
            yield int(line["step"]), rate if isinstance(rate, int | float) else 0.0


def _who(by: dict[str, object] | None) -> str:
    return f"process {by['pid']} on {by['host']}" if by and by["pid"] else ""
