"""Result rows: which may be drawn, which count, which failed, which are stale, what each is called.

A row is a plain dict of one of the types of `results.row`; the report reads rows and nothing else, so that a file of
results from another machine is drawn like one's own. Rows are checked once, by `sift`: what comes after may trust them,
and what was left out is said beside what is drawn.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from attention_zoo.files import plain
from attention_zoo.measure.identity import COSMETIC, source_digest
from attention_zoo.results.check import wrong_with
from attention_zoo.results.row import Row
from attention_zoo.rules import shown

STATUS = {
    "oom": "out of memory",
    "oom_predicted": "predicted out of memory, not run",
    "timeout": "timed out",
    "failed": "failed",
    "lost": "lost: killed from outside, runs again by itself",
    "unsupported": "not supported",
    "missing": "not installed",
}
BASELINES = {("full", "dense"): "full (materialised)", ("full", "sdpa"): "full (fused)"}
"""What every mechanism is compared with, by (backend, kernel): the same sums, with and without L x S in memory."""
FROM = "from"
"""The key that says which of several files of results a row stands in; `sources.read` sets it."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What would act on a terminal or on the text around it, instead of being read."""
_DEEPEST = 40
_LARGEST = 10**300
_WORK = (
    FROM, "kind", "backend", "against", "task", "seed", "seq_len", "variant", "phase", "kernel", "length", "batch",
    "heads", "head_width", "causal", "device", "dtype", "threads", "budget_bytes",
)  # fmt: skip
"""What a row says of its work beside its config."""


class LeftOut(NamedTuple):
    """Something that was to be read and is not drawn: where it stands, and what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Rows(list[Row]):
    """Rows that were checked: each may be drawn, and no result stands there twice.

    Fields:
        left_out: what was not fit to be drawn.
        replaced: how many results of older code are not among them, since the code at hand measured the same again.
    """

    def __init__(self, rows: Iterable[Row] = (), left_out: Iterable[LeftOut] = (), replaced: int = 0):
        super().__init__(rows)
        self.left_out, self.replaced = list(left_out), replaced


def sift(rows: Iterable[Any]) -> Rows:
    """Rows fit to be drawn, one for each result; those that were sifted before are handed back as they are."""
    if isinstance(rows, Rows):
        return rows
    good, bad = check(rows)
    return fresh(unique(good), bad)


def check(rows: Iterable[Any], where: str | None = None) -> tuple[list[Row], list[LeftOut]]:
    """Rows that are what their kind must be (`results.check`), made plain, and what is wrong with the others.

    Args:
        rows: anything.
        where: names the file in what is said about a row; None for rows of no file.
    """
    good, bad = [], []
    for number, row in enumerate(rows, 1):
        try:
            row = clean(row)
            wrong = wrong_with(row) if isinstance(row, dict) else f"must be a mapping, got {shown(row, 60)}"
        except (RecursionError, ValueError) as error:
            wrong = str(error) if isinstance(error, ValueError) else "nested too deeply"
        if wrong is None:
            good.append(row)
        else:
            bad.append(LeftOut(f"{where}, row {number}" if where else f"row {number}", wrong))
    return good, bad


def fresh(rows: list[Row], left_out: Iterable[LeftOut] = ()) -> Rows:
    """Rows without those of older code that measured what the code at hand measured again, in the same place."""
    mine = source_digest()
    again = {_work(row) for row in rows if row.get("id") and _code(row) == mine}
    kept = [row for row in rows if _code(row) == mine or not row.get("id") or _work(row) not in again]
    return Rows(kept, left_out, len(rows) - len(kept))


def _code(row: Row) -> Any:
    return (row.get("environment") or {}).get("source")


def _work(row: Row) -> str:
    """All that says what was done and where, but for the code."""
    config = {key: value for key, value in (row.get("config") or {}).items() if key not in COSMETIC}
    environment = row.get("environment") or {}
    place = [environment.get(key) for key in ("cpu", "cuda", "torch")]
    return json.dumps([[row.get(key) for key in _WORK], place, config, row.get("data")], sort_keys=True)


def clean(value: Any) -> Any:
    """The same as plain JSON values, without control characters: it may be shown anywhere.

    Raises:
        ValueError: for what is nested deeper than any row is, or a number that is too long to be written.
    """
    return _clean(plain(value), _DEEPEST)


def _clean(value: Any, depth: int) -> Any:
    if depth < 0:
        raise ValueError(f"must be nested at most {_DEEPEST} deep")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("a whole number has more than 300 digits")
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_CONTROL.sub("\ufffd", key): _clean(inner, depth - 1) for key, inner in value.items()}
    return [_clean(inner, depth - 1) for inner in value] if isinstance(value, list) else value


def unique(rows: Iterable[Row]) -> list[Row]:
    """Each result once, in the order of first appearance; rows without an id are kept.

    Of one identity in one file the last row counts. Of rows that are alike in everything and stand in several files,
    that in the file with most rows counts, so that a line that stands there whole stays whole.
    """
    last: dict[Any, Row] = {}
    for number, row in enumerate(rows):
        last[(row.get(FROM), row["kind"], row["id"]) if row.get("id") else number] = row
    sizes = Counter(row.get(FROM) for row in last.values())
    found: dict[Any, Row] = {}
    for number, row in enumerate(last.values()):
        key = _content(row) if row.get("id") else number
        if key not in found or sizes[row.get(FROM)] > sizes[found[key].get(FROM)]:
            found[key] = row
    return list(found.values())


def _content(row: Row) -> str:
    return json.dumps({key: value for key, value in row.items() if key != FROM}, sort_keys=True)


def of(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def ok(row: Row) -> bool:
    return row["status"] == "ok"


def why(row: Row) -> str:
    """One line on why a row holds no figure."""
    return f"{status(row)}: {row['error']}" if row.get("error") else status(row)


def status(row: Row) -> str:
    """The status in words."""
    return STATUS.get(row["status"], str(row["status"]))


def stale(rows: Iterable[Row], digest: str) -> list[Row]:
    """Rows that were made by other code than `digest` stands for."""
    return [row for row in rows if (row.get("environment") or {}).get("source") not in (None, digest)]


def options(row: Row) -> dict[str, Any]:
    """The mechanism's own options that a row was made with, as far as its config tells."""
    config = row.get("config") or {}
    found, model = config.get("options"), config.get("model")
    if isinstance(found, dict) and isinstance(model, dict):
        found = {**found, **model}  # of a whole model that was measured
    if found is None:
        found = {"hybrid": config["hybrid"]} if config.get("hybrid") else config.get("attention")
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if key not in ("_target_", "_partial_", "_convert_", "name")}


def what(row: Row, label: str | None = None) -> str:
    """What a row is about, in words.

    Args:
        label: what its line is called in charts, where that tells more than the backend.
    """
    plain = str(BASELINES.get((row["backend"], row.get("kernel") or ""), row["backend"]))
    file = f" [{row[FROM]}]" if row.get(FROM) else ""
    name = label or f"{plain}{file}"
    if row["kind"] == "speed":
        phase = str(row.get("phase") or "").replace("_", " + ")
        return f"{name}, {row.get('variant')} {phase}, {row['length']:,} tokens"
    if row["kind"] == "peer":
        return f"{name} against {row['title']}, {row['variant']}, {row['length']:,} tokens"
    if row["kind"] == "budget":
        return f"{name}, longest {row['variant']} within {row['budget_bytes']:,} bytes"
    if row["kind"] == "quality":
        return f"{name}, trained on {row.get('task')}, seed {row.get('seed')}"
    return f"{name}, attention picture"
