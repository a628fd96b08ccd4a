"""Which process of how many this one is, by what a launcher has left in its environment.

| launcher | variables |
|---|---|
| torchrun, Ray, anything that speaks its language | RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT |
| srun of Slurm | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID, SLURM_STEP_ID |

A script of Slurm's that starts no step (`sbatch` without `srun`) has the job's variables and is one process: those of
the step alone count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20_000, 40_000)
"""Of which one is taken for a step of Slurm's that names none."""


class Launched(NamedTuple):
    """One of the processes that a launcher has started.

    Fields:
        rank: its number, from 0 on.
        size: how many there are.
        local_rank: its number among those of this machine.
        meeting: where the others are met, as torch writes it; None for one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meeting: str | None = None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """What the environment says of this process; default that of the process.

    Raises:
        ValueError: for variables that are missing, are no numbers or contradict each other.
    """
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" in given or "RANK" in given:
        return _of_torchrun(given)
    if "SLURM_STEP_NUM_TASKS" in given and "SLURM_PROCID" in given:
        return _of_slurm(given)
    return Launched()


def _of_torchrun(given: Mapping[str, str]) -> Launched:
    size = _number(given, "WORLD_SIZE", 1)
    if size == 1:
        return Launched()
    if missing := [name for name in LAUNCHER if not given.get(name)]:
        raise ValueError(
            f"{' and '.join(missing)} must be set where WORLD_SIZE={size} is; start the run with "
            f"torchrun --nproc-per-node {size} -m attention_zoo train ..."
        )
    rank = _number(given, "RANK", 0)
    local_rank = _number(given, "LOCAL_RANK", 0) if given.get("LOCAL_RANK") else rank
    _number(given, "MASTER_PORT", 1)
    # by the environment: torchrun itself keeps the addresses there, and says so by a variable of its own
    return _checked(Launched(rank, size, local_rank, "env://"))


def _of_slurm(given: Mapping[str, str]) -> Launched:
    size = _number(given, "SLURM_STEP_NUM_TASKS", 1)
    if size == 1:
        return Launched()
    job, step = _number(given, "SLURM_JOB_ID", 0), _number(given, "SLURM_STEP_ID", 0)
    address = given.get("MASTER_ADDR") or first_host(given.get("SLURM_STEP_NODELIST", ""))
    # steps of one job run beside each other: neighbouring numbers must not meet at one port
    chosen = PORTS[(31 * job + step) % len(PORTS)]
    port = _number(given, "MASTER_PORT", 1) if given.get("MASTER_PORT") else chosen
    rank, local_rank = _number(given, "SLURM_PROCID", 0), _number(given, "SLURM_LOCALID", 0)
    return _checked(Launched(rank, size, local_rank, f"tcp://{address}:{port}"))


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: `node[03-05,9],login` is node03 and more.

    Raises:
        ValueError: for an empty list.
    """
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST must list machines, got {nodes!r}")
    return "".join(part or "" for part in found.groups())


def _checked(found: Launched) -> Launched:
    if not found.rank < found.size:
        raise ValueError(f"RANK must be below WORLD_SIZE, got {found.rank} of {found.size}")
    return found


def _number(given: Mapping[str, str], name: str, least: int) -> int:
    text = given.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {text!r}")
    return int(text)
