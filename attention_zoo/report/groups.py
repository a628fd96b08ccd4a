"""What was made alike and what was not: rows that differ in their seed alone are one group, and what sets groups apart
is in their names.

A group's facts are its mechanism's options, and everything else of its config, its code, its machine and its file. The
options set apart those of one mechanism; anything else that differs is named for all that stand together, or for the
few that are not as most are. How a task's
documents were shortened is an option of whatever read them: to read less is a rival of reading cheaply.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attention_zoo.measure.identity import COSMETIC
from attention_zoo.report import rows as results
from attention_zoo.report.rows import FROM
from attention_zoo.results.regime import differs_by_regime
from attention_zoo.results.row import Row

Facts = Mapping[str, str]
"""Dotted name -> value in words."""
Place = tuple[tuple[str, str], ...]
"""Where and by what a row was made: facts and their values."""

SILENT = COSMETIC | {"retry", "seed", "trainer.log_every", "trainer.checkpoint_every"}
"""Keys of a config that change nothing about what is computed, and the seed, over which a group is taken."""
MECHANISM = ("attention", "options", "hybrid", "backend", "name")
COMPRESS = "compress"
"""The option of tasks, and of groups, that says how documents were shortened."""
WIDEST = 48
NEARLY_ALL = 0.75


class Group(NamedTuple):
    """What rows have in common.

    Fields:
        backend, kernel: of all; the kernel is "" for trainings.
        options: of the mechanism, and how documents were shortened for it.
        made: everything else that must be alike before figures may be compared, but for the place.
        place: code, software, machine and file; empty where a row did not live to tell.
    """

    backend: str
    kernel: str
    options: tuple[tuple[str, str], ...]
    made: tuple[tuple[str, str], ...]
    place: Place

    @property
    def shared(self) -> dict[str, str]:
        """All but the mechanism and its options."""
        return {**dict(self.made), **dict(self.place)}


def group_of(row: Row) -> Group:
    """The group of a speed, quality or portrait row."""
    made: dict[str, str] = {}
    if row["kind"] == "quality":
        config = {key: value for key, value in (row.get("config") or {}).items() if key not in (*MECHANISM, "task")}
        made = {key: value for key, value in flat(config) if not silent(key)}
        if row.get("batch") is not None:
            made.setdefault("batch", str(row["batch"]))
    kernel = "" if row["kind"] == "quality" else str(row.get("kernel") or "")
    options = dict(flat(results.options(row)))
    if how := shortening(row):
        options[COMPRESS] = how
    return Group(row["backend"], kernel, _pairs(options.items()), _pairs(made.items()), place_of(row))


def shortening(row: Row) -> str:
    """How the documents of a training were shortened, in words; "" where they were whole."""
    task = (row.get("config") or {}).get("task")
    how = task.get(COMPRESS) if row["kind"] == "quality" and isinstance(task, dict) else None
    if not isinstance(how, dict):
        return ""
    rest = [f"{key}={value}" for key, value in flat(how) if key not in ("method", "budget")]
    return " ".join([str(how.get("method")), str(how.get("budget")), *rest])


def place_of(row: Row) -> Place:
    """Where and by what a row was made."""
    environment = row.get("environment") or {}
    cuda = environment.get("cuda")
    found = {
        "file": row.get(FROM),
        "cpu": environment.get("cpu"),
        "gpu": cuda.get("device") if isinstance(cuda, dict) else None,
        "torch": environment.get("torch"),
        "code": environment.get("source"),
    }
    return tuple((key, str(value)) for key, value in found.items() if value is not None)


def silent(key: str) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in SILENT)


def flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and words; a class stands for itself under the name of its setting."""
    for key, item in value.items():
        if key in ("_partial_", "_convert_"):
            continue
        dotted = path if key == "_target_" else f"{path}.{key}" if path else str(key)
        if isinstance(item, dict) and item:
            yield from flat(item, dotted)
        elif key == "_target_":
            yield dotted or "target", str(item).rpartition(".")[2]
        else:
            yield dotted, item if isinstance(item, str) else json.dumps(item)


def _pairs(items: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(items))


def differing(many: Sequence[Facts]) -> list[str]:
    """The names of the facts in which several differ."""
    keys = dict.fromkeys(key for each in many for key in each)
    return [key for key in keys if len({each.get(key) for each in many}) > 1]


def meant(key: str, rows: Sequence[Row]) -> bool:
    """Whether runs differ in a fact on purpose: by what was made equal for all of them instead, or by learning rates
    that were chosen for each among several."""
    return all(differs_by_regime(row, key) for row in rows) and len({row.get("regime") for row in rows}) == 1


def labels(groups: Sequence[Group], names: Mapping[tuple[str, str], str]) -> list[str]:
    """A name for each of several groups that stand together; no two alike.

    Args:
        groups: those of one chart or table.
        names: of (backend, kernel) where the two together have one, such as the baselines.
    """
    common = [key for key in differing([group.shared for group in groups]) if not _told_by_file(groups, key)]
    shortened = len({dict(group.options).get(COMPRESS) for group in groups}) > 1
    common.sort(key=lambda key: (key != "file", key))
    usual = {key: _of_most([group.shared.get(key) for group in groups]) for key in common}
    found = []
    for group in groups:
        alike = [other for other in groups if (other.backend, other.kernel) == (group.backend, group.kernel)]
        kernels = {other.kernel for other in groups if other.backend == group.backend}
        base = names.get((group.backend, group.kernel))
        extra = [group.kernel] if base is None and group.kernel and len(kernels) > 1 else []
        keys = differing([dict(other.options) for other in alike])
        keys += [COMPRESS] if shortened and COMPRESS not in keys else []
        extra += words(dict(group.options), keys)
        said = ", ".join(extra + words(group.shared, [key for key in common if group.shared.get(key) != usual[key]]))
        base = base or group.backend
        if said:
            base = f"{base[:-1]}; {said})" if base.endswith(")") else f"{base} ({said})"
        found.append(base)
    return apart(found)


def _of_most(values: Sequence[str | None]) -> str | None:
    """The value of nearly all, which need not be said; None: of nobody."""
    ((value, count),) = Counter(values).most_common(1)
    return value if count >= NEARLY_ALL * len(values) else None


def _told_by_file(groups: Sequence[Group], key: str) -> bool:
    """Whether files that differ in something (such as their machine) are told apart by their names already."""
    found: dict[Any, set[Any]] = {}
    for group in groups:
        place = dict(group.place)
        if key in ("file", *dict(group.made)) or "file" not in place:
            return False
        found.setdefault(place["file"], set()).add(place.get(key))
    return all(len(values) == 1 for values in found.values())


def words(facts: Facts, keys: Sequence[str]) -> list[str]:
    """Facts as one writes them; a file is named by its name alone."""
    said = []
    for key in keys:
        if key in facts:
            value = facts[key][:8] if key == "code" else facts[key]
            value = value if len(value) <= WIDEST else f"{value[: WIDEST - 1]}…"
            said.append(value if key == "file" else f"{key}={value}")
    return said


def apart(found: Sequence[str]) -> list[str]:
    """The same names, numbered where two are alike."""
    counts, seen = Counter(found), Counter[str]()
    said = []
    for name in found:
        seen[name] += 1
        said.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return said


def gather(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """Rows by group, in the order of first appearance. A row that did not live to tell where it was made goes to a
    group of its kind that did."""
    groups: dict[Group, list[Row]] = {}
    orphans = []
    for row in rows:
        if results.ok(row) or row.get("environment"):
            groups.setdefault(group_of(row), []).append(row)
        else:
            orphans.append(row)
    for row in orphans:
        mine = group_of(row)
        near = (each for each in groups if each[:4] == mine[:4] and dict(each.place).get("file") == row.get(FROM))
        groups.setdefault(next(near, mine), []).append(row)
    return groups
