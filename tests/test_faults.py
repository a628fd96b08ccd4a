"""The small version of every kind of fault: nothing false, nothing lost, no raw error, no hang, no orphan."""

from __future__ import annotations

import pytest
from faults import Counts
from faults.kinds import KINDS

LASTING = {"cells", "distributed", "followed", "fuzz", "kills", "odd", "searches", "sweeps", "wandb"}
"""Kinds whose small version, too, starts many processes."""
LONG = {"distributed"}
"""Kinds of which even that takes longer than CI has: torch is started anew by every process of every try."""


def marks(kind: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (kind in LASTING) + [pytest.mark.long] * (kind in LONG)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks(kind)) for kind in KINDS])
def test_nothing_wins(kind: str) -> None:
    found = KINDS[kind].run(KINDS[kind].SMALL, 0)
    assert isinstance(found, Counts)
    assert found.tries >= KINDS[kind].SMALL
    assert not found.failures
