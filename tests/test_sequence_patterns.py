"""Patterns on a sequence that 2, 3 and 4 processes own: all of one process, gradients included, and little sent.

Processes are started once for each number of them and run everything; what is wrong comes back in words.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing
from sequence_cases import BAND, BLOCKS, GLOBAL, RING, Case, work
from sequence_checks import CHECKS


def ran(size: int, path: Path, cases: list[Case]) -> str:
    torch.multiprocessing.start_processes(work, (size, str(path), cases, CHECKS), nprocs=size, start_method="spawn")
    return "\n".join((path / f"{rank}.txt").read_text() for rank in range(size)).strip()


def test_two_processes_are_one(tmp_path: Path) -> None:
    assert ran(2, tmp_path, BAND[::2] + GLOBAL[::2] + BLOCKS[::2] + RING[::2]) == ""


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.slow
def test_many_processes_are_one(size: int, tmp_path: Path) -> None:
    assert ran(size, tmp_path, BAND + GLOBAL + BLOCKS + RING) == ""


def test_three_processes_are_one(tmp_path: Path) -> None:
    assert ran(3, tmp_path, BAND[1::2] + GLOBAL[1::2] + BLOCKS[1::2] + RING[1::2]) == ""
