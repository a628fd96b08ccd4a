"""How far a trained mechanism looks back, and what it answered within and beyond that.

| word | of which distances | from |
|---|---|---|
| surely | every query of a layer sees every key | options; the definition, for full attention |
| one layer | a query of one layer may see a key: hashed, drawn, linked | `given.layer_reach` |
| model | layers hand something on | `given.reach` |

Recall by content goes one layer far, however many there are, so that "within reach" is what is surely seen; where
options do not say that (hashing), what one layer may see. A figure is of one side of that edge, never of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attention_zoo.report import convergence
from attention_zoo.results.row import Row

ALL = 2**62
"""Farther than any row."""
BY_REACH = frozenset({"mqar"})
"""Tasks of recall, whose accuracy is told within and beyond a mechanism's reach and not as a whole."""


class Reach(NamedTuple):
    """Tokens back; None where rows do not tell, `ALL` where everything is seen.

    Fields:
        surely: that every query of a layer sees.
        layer: that one layer may see.
        model: that the whole model may see.
        length: of the rows that tell; what reaches as far as they do may reach farther, and nobody knows.
    """

    surely: int | None
    layer: int | None
    model: int | None
    length: int

    @property
    def edge(self) -> int | None:
        """Up to which distance answers are within reach."""
        return self.layer if self.surely is None else self.surely

    def sees(self, distance: int) -> str:
        """surely | perhaps | through layers | no | not known."""
        if self.surely is not None and distance <= self.surely:
            return "surely"
        if self.layer is not None and distance <= self.layer:
            return "perhaps"
        if self.model is not None and distance <= self.model:
            return "through layers"
        known = self.model is not None and self.model < self.length - 1
        return "no" if known else "not known"


def reach_of(row: Row) -> Reach:
    """Of a training."""
    length = int(row.get("seq_len") or 0)
    if _is_full(row):
        return Reach(ALL, ALL, ALL, length)
    given: Mapping[str, Any] = row.get("given") or {}
    layer, model = given.get("layer_reach"), given.get("reach")
    surely = convergence.surely_seen(row)
    if surely is not None:
        layer = None if layer is None else max(layer, min(surely, length - 1))
    return Reach(surely, layer, model, int(given.get("length") or length))


def _is_full(row: Row) -> bool:
    """Whether all layers are full attention over all tokens, nothing shortened and nothing around them."""
    config = row.get("config") or {}
    model = config.get("model")
    model = model if isinstance(model, dict) else {}
    return mechanism(row) == "full" and not (config.get("hybrid") or model.get("shorten") or model.get("around"))


def mechanism(row: Row) -> str:
    """The registered name behind a row; that of a variant stands in its options."""
    attention = (row.get("config") or {}).get("attention")
    name = attention.get("name") if isinstance(attention, dict) else None
    return str(name or row["backend"])


def accuracy(row: Row, edge: int | None, *, beyond: bool) -> float | None:
    """The share of right answers of a run at distances up to an edge, or beyond it.

    A group of several distances is named by the largest, which may be longer than the row, and begins behind its half;
    one that holds both sides of the edge counts for neither. None without any answer there, or without an edge.
    """
    groups: Sequence[Sequence[float]] = (row.get("by_group") or {}).get("distance") or []
    if edge is None:
        return None
    right = asked = 0.0
    names = [int(each[0]) for each in groups]
    longest = int(row.get("seq_len") or 0) - 1 or ALL
    for distance, share, _, count in groups:
        smallest = _smallest(int(distance), names)
        if (smallest > edge) if beyond else (0 <= min(distance, longest) <= edge):
            right, asked = right + share * count, asked + count
    return right / asked if asked else None


def _smallest(name: int, names: Sequence[int]) -> int:
    """The smallest distance that a group may hold. In bins that double all names are 0 or powers of two; where each
    distance has its own group, some other distance is among them, or all are so small that both are the same."""
    doubling = all(each == 0 or each & (each - 1) == 0 for each in names)
    return name // 2 + 1 if doubling and name > 2 else name
