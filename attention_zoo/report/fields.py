"""A table of words: what runs say under each name, each value once: 500 configs stay small and fast to filter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attention_zoo.report import groups
from attention_zoo.report.rows import FROM
from attention_zoo.results.row import Row

PLAIN = (
    "mechanism", "task", "length", "device", "seed", "status", "kind", "sweep", "setting", "dtype", "batch", "kernel",
    "threads", "label",
)  # fmt: skip
"""What is asked of every row, the most asked for first; then come its config and its environment, by dotted name."""
KINDS = {"speed": "cost", "peer": "peer", "budget": "budget", "quality": "training", "portrait": "picture"}


class Fields:
    """Names and values, each once.

    Attributes:
        names: of the fields, in the order of first appearance behind `PLAIN`.
        values: of each.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: list[list[str]] = []
        self._place: dict[str, int] = {}
        self._known: list[dict[str, int]] = []
        for name in PLAIN:
            self._field(name)

    def add(self, facts: Iterator[tuple[str, str]]) -> list[int]:
        """The place of a run's value under each field; -1 where it says nothing."""
        found: dict[int, int] = {}
        for name, value in facts:
            field = self._field(name)
            known = self._known[field]
            if value not in known:
                known[value] = len(known)
                self.values[field].append(value)
            found[field] = known[value]
        return [found.get(field, -1) for field in range(max(found, default=-1) + 1)]

    def table(self) -> list[list[Any]]:
        return [[name, values] for name, values in zip(self.names, self.values)]

    def _field(self, name: str) -> int:
        if name not in self._place:
            self._place[name] = len(self.names)
            self.names.append(name)
            self.values.append([])
            self._known.append({})
        return self._place[name]


def facts(row: Row, plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """All that a run says in words.

    Args:
        plain: what is derived: label, task and setting.
    """
    found = {
        "mechanism": row["backend"], "kind": KINDS.get(row["kind"], row["kind"]), "status": row["status"],
        "length": row.get("seq_len") or row.get("length"), "sweep": row.get(FROM),
        **{key: row.get(key) for key in ("device", "seed", "dtype", "batch", "kernel", "threads")}, **plain,
    }  # fmt: skip
    config = row.get("config") or {}
    for key in ("device", "threads", "batch", "seed"):  # trainings say so in their config alone
        if found.get(key) is None:
            found[key] = config.get(key)
    yield from ((key, str(value)) for key, value in found.items() if value is not None)
    yield from groups.flat({key: value for key, value in config.items() if key not in PLAIN})
    yield from groups.flat(row.get("environment") or {}, "environment")
    if isinstance(row.get("data"), dict):
        yield from groups.flat(row["data"], "data")
