"""All kinds of faults, in the order of the table."""

from __future__ import annotations

from typing import Protocol

from . import (
    Counts,
    cells,
    disk,
    distributed,
    followed,
    fuzz,
    kills,
    odd,
    reports,
    scores,
    searches,
    sweeps,
    torn,
    wandb_server,
)


class Kind(Protocol):
    """A module that throws one kind of fault.

    Attributes:
        TITLE: what is thrown, for the table.
        SMALL, LARGE: tries in CI and by the command.
    """

    TITLE: str
    SMALL: int
    LARGE: int

    def run(self, count: int, seed: int) -> Counts: ...


KINDS: dict[str, Kind] = {
    "scores": scores,
    "fuzz": fuzz,
    "kills": kills,
    "distributed": distributed,
    "cells": cells,
    "sweeps": sweeps,
    "searches": searches,
    "followed": followed,
    "torn": torn,
    "disk": disk,
    "odd": odd,
    "wandb": wandb_server,
    "reports": reports,
}
