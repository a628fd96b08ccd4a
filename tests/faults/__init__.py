"""Faults thrown at the product, and what was lost: kills, torn and hostile files, full disks, dead servers, odd values.

Each module throws one kind: `TITLE` says which, `run(count, seed)` throws `count` of them, drawn by `seed`, and returns
`Counts`. The small version runs in CI (test_faults.py); the large one, with the README's table, by

    python -m tests.faults
"""

from __future__ import annotations

from dataclasses import dataclass, field

WAYS = ("wrong", "lost", "raw", "hung", "orphan")
"""How a fault can win: a false result; a result gone; a traceback, or a message that does not say what to do; no end; a
process left behind."""


@dataclass
class Counts:
    """What one kind of fault did.

    Fields:
        tries: faults thrown.
        failures: (way, description with which the case can be thrown again).
    """

    tries: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def failed(self, way: str, case: str) -> None:
        assert way in WAYS, way
        self.failures.append((way, case))

    def count(self, way: str) -> int:
        return sum(found == way for found, _ in self.failures)
