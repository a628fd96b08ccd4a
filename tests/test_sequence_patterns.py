"""Patterns on a sequence that 2, 3 and 4 processes own: all of one process, gradients included, and little sent.

Processes are started once for each number of them and run everything; what is wrong comes back in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from sequence_cases import BAND, BLOCKS, GLOBAL, GROUPS, RING, Case, work
from sequence_checks import CHECKS, SLOW_CHECKS

CASES = [*BAND, *GLOBAL, *BLOCKS, *RING, *GROUPS]


def ran(size: int, path: Path, cases: list[Case], checks: list[Any]) -> str:
    torch.multiprocessing.start_processes(work, (size, str(path), cases, checks), nprocs=size, start_method="spawn")
    return "\n".join((path / f"{rank}.txt").read_text() for rank in range(size)).strip()


@pytest.mark.parametrize("size", [2, 3])
def test_some_processes_are_one(size: int, tmp_path: Path) -> None:
    assert ran(size, tmp_path, CASES[size::4], CHECKS) == ""


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.slow
@pytest.mark.long
def test_processes_are_one(size: int, tmp_path: Path) -> None:
    assert ran(size, tmp_path, CASES, CHECKS + SLOW_CHECKS) == ""
