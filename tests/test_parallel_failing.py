"""What one process alone cannot do ends all of them at once, with its number and its reason."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from parallel_runs import REFUSAL, STAYS_S, Planned

from attention_zoo.parallel.failing import sockets

WORDS = [
    "task=text", "task.held_out=null", "task.evaluation_rows=3", "seq_len=12", "batch=6", "steps=3",
    "trainer.eval_every=1", "trainer.carry_state=false", "parallel.timeout_s=60", "attention=longformer",
    "attention.window=3",
]  # fmt: skip
DEVICE, FIRST, LATER = 0, 1, 6
"""Before the processes have met; calls of a block: the first of all; one of the second step or of an evaluation."""
RUNS: dict[str, tuple[int, int, int, list[str]]] = {
    "device": (2, 1, DEVICE, []),
    "rows": (2, 1, FIRST, []),
    "tokens": (2, 0, LATER, ["parallel.sequence=2"]),
    "shares": (2, 1, LATER, ["parallel.data=fsdp"]),
    "three": (3, 2, LATER, ["parallel.sequence=3"]),
}
"""Processes, who refuses, at which call, and words."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = Planned(tmp_path_factory.mktemp("failing"), WORDS)
    for name, (processes, rank, calls, words) in RUNS.items():
        plan.add(name, processes, name, *words, refuse={"rank": rank, "calls": calls})
    plan.add("late", 2, "late", refuse={"rank": 1, "calls": DEVICE}, late_s=1.0)
    return {"place": plan.place, **plan.done()}


@pytest.mark.parametrize("name", RUNS)
def test_all_end_when_one_refuses_and_say_who_and_why(name: str, ended: dict[str, Any]) -> None:
    processes, refuser, calls, _ = RUNS[name]
    rows = ended[name]
    assert [row["status"] for row in rows] == ["failed"] * processes, rows
    for rank, row in enumerate(rows):
        assert row["error"] == ("" if rank == refuser else f"process {refuser} of {processes}: ") + REFUSAL
        assert row["refused"] == (calls != LATER), "before the first step nothing has begun"
        # the others know it while the one that refused, its model and its tracebacks live on
        assert row["ended"] - rows[refuser]["ended"] < STAYS_S / 2


def test_nobody_ends_before_all_have_met(ended: dict[str, Any]) -> None:
    """Who closes its connections while another is still meeting it would end that one without a reason."""
    first, refuser = ended["late"]
    assert refuser["error"] == REFUSAL
    assert first["error"] == f"process 1 of 2: {REFUSAL}"
    assert refuser["ended"] > first["met"][0]


def test_the_row_is_written_with_the_reason_of_another(ended: dict[str, Any]) -> None:
    text = (ended["place"] / "rows" / "result.json").read_text()
    assert f"process 1 of 2: {REFUSAL}" in text
    assert not list((ended["place"] / "rows").glob("checkpoint*")), "no step was finished"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list what a process has open")
def test_connections_are_found_and_nothing_else() -> None:
    before = sockets()
    with socket.socket() as server, socket.socket() as one, open(os.devnull) as _:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert sockets().keys() == before.keys(), "who listens is connected to nobody"
        one.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            found = sockets()
            assert {found[inode] for inode in found.keys() - before.keys()} == {one.fileno(), other.fileno()}
