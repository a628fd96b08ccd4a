"""Which rows are of one mechanism at the same options: the lines of the matrix, for trainings and costs alike.

Trainings write all options down and cells those that were given; both are told by what differs from the defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from attention_zoo import registry
from attention_zoo.model.mechanisms import has_own_positions
from attention_zoo.report import groups
from attention_zoo.report import rows as results
from attention_zoo.report.reach import mechanism
from attention_zoo.results.row import Row

SILENT = ("kernel", "seed", "global_projections")
"""Options that change neither what is seen nor, in rows without global tokens, what is computed."""


class Line(NamedTuple):
    """A mechanism at stated options.

    Fields:
        backend: its name, or that of a variant.
        options: that are not its defaults, each in words.
    """

    backend: str
    options: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        said = ", ".join(f"{key}={value}" for key, value in self.options)
        if self.backend == "full" and not said:
            return "full"
        return f"{self.backend} ({said or 'defaults'})"


def line_of(row: Row) -> Line:
    """Of a training or a cell."""
    defaults = _defaults(row)
    own = {
        key: value for key, value in results.options(row).items()
        if key not in SILENT and not (key in defaults and defaults[key] == value)
    }  # fmt: skip
    if how := groups.shortening(row):
        own[groups.COMPRESS] = how
    said = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in own.items())
    return Line(row["backend"], tuple(sorted(said)))


def known(row: Row) -> bool:
    """Whether the defaults of a row's mechanism are: not of somebody else's that is not installed here."""
    return mechanism(row) in (*registry.available(), *registry.wrappers())


def _defaults(row: Row) -> Mapping[str, Any]:
    return registry.recipe(mechanism(row))[1] if known(row) else {}


OWN = "of its own"
"""The positions of a mechanism that brings some."""


def positions_of(row: Row) -> str | None:
    """The position scheme that a training had; None where it does not say."""
    if known(row) and has_own_positions(registry.recipe(mechanism(row))[0]):
        return OWN
    said = (row.get("given") or {}).get("positions")
    return None if said is None else str(said)


class Source(NamedTuple):
    """Where a row stands: what a sentence is linked to."""

    file: str
    id: str
    code: str
    device: str

    @staticmethod
    def of(row: Row) -> Source:
        environment = row.get("environment") or {}
        cuda = environment.get("cuda")
        device = cuda.get("device") if isinstance(cuda, dict) else environment.get("cpu")
        return Source(
            str(row.get(results.FROM) or ""), str(row.get("id") or "without id"),
            str(environment.get("source") or "not said"), str(device or "not said"),
        )  # fmt: skip
