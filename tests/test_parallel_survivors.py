"""A process of a run is killed: what is lost is the step in flight, and the run ends with the bits of one that was not.

Checkpoints are never due here: what the next one goes on from is what the others saved when they lost it.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from parallel_runs import Planned

WORDS = [
    "task=text", "task.held_out=null", "task.evaluation_rows=3", "task.span=3", "seq_len=12", "batch=8", "steps=9",
    "trainer.eval_every=4", "trainer.checkpoint_every=1000", "trainer.log_every=1", "parallel.timeout_s=20",
    "model.output_dropout=0.1",
]  # fmt: skip
CARRIED = ["attention=transformer_xl", "attention.segment_length=5", "attention.memory_length=7"]
KINDS = {"carried": CARRIED, "full": ["attention=full"], "accumulated": [*CARRIED, "trainer.accumulate=2"]}
EXACT = (
    "curve", "quality_curve", "metrics", "evaluations", "loss_by_position", "by_group", "readings", "steps", "stopped",
    "id", "model_sha256",
)  # fmt: skip
MOMENTS = 10
CALLS = 9000
"""Python functions in about three steps and an evaluation."""


def lose(plan: Planned, name: str, processes: int, *words: str, **when: Any) -> None:
    """A run that loses a process, and the same again."""
    plan.add(f"{name} cut", processes, name, *words, cut={"how": "SIGKILL", **when}, left_s=30.0)
    plan.add(f"{name} on", processes, name, *words)


def done(plan: Planned) -> dict[str, Any]:
    return {"place": plan.place, **plan.done()}


def said(row: dict[str, Any]) -> int:
    """The step that was saved, as the row of a process says that has lost another; -1 for one that a third saves."""
    assert row["status"] == "lost", row
    assert "another process of the run is gone" in row["error"]
    words = row["error"].rpartition("; ")[2]
    if words == "another process saves the last step":
        return -1
    assert words.startswith("step "), row["error"]
    assert " is saved" in words
    return int(words.split()[1])


def same(found: dict[str, Any], name: str, whole: str) -> None:
    """It went on to the same bits, and the figures that were logged are those of a run that nobody disturbed."""
    place = found["place"]
    for row in found[f"{name} on"]:
        assert row["status"] == "ok", row["error"]
        assert row["notices"] == []
        for field in EXACT:
            assert row[field] == found[whole][0][field], field
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if "per_second" not in key}
            for line in (place / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (name, whole)
    ]
    assert lines[0] == lines[1]
    assert not list((place / name).glob(".*.d")), "nothing half written is left"


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = Planned(tmp_path_factory.mktemp("survivors"), WORDS)
    plan.add("whole", 2, "whole", *CARRIED)
    lose(plan, "first", 2, *CARRIED, rank=0, step=5)
    return done(plan)


def test_process_0_is_killed_and_the_other_saves_the_step_before(fast: dict[str, Any]) -> None:
    dead, other = fast["first cut"]
    assert dead == {"error": "died"}
    assert said(other) == 5
    assert "is saved by process 1" in other["error"]
    assert [row["resumed_at"] for row in fast["first on"]] == [5, 5]
    same(fast, "first", "whole")


def moments(processes: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Whose death, and when: after some number of calls since some step began."""
    rng = random.Random(seed)
    return [
        (kind, {"rank": number % processes, "step": rng.randrange(1, 9), "calls": rng.randrange(1, CALLS)})
        for number, kind in enumerate((list(KINDS) * MOMENTS)[:MOMENTS])
    ]


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = Planned(tmp_path_factory.mktemp("anywhere"), WORDS)
    for processes in (2, 3):
        words = ["batch=6"] if processes == 3 else []
        for kind, own in KINDS.items():
            plan.add(f"whole-{processes}-{kind}", processes, f"whole-{processes}-{kind}", *own, *words)
        for number, (kind, cut) in enumerate(moments(processes, 7)):
            lose(plan, f"{processes}-{number}", processes, *KINDS[kind], *words, **cut)
    return done(plan)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("number", range(MOMENTS))
@pytest.mark.parametrize("processes", [2, 3])
def test_any_process_is_killed_at_any_moment(processes: int, number: int, anywhere: dict[str, Any]) -> None:
    kind, cut = moments(processes, 7)[number]
    name = f"{processes}-{number}"
    ended, on = anywhere[f"{name} cut"], anywhere[f"{name} on"]
    finished = int((anywhere["place"] / f"{name}.done").read_text())
    if ended[cut["rank"]] == {"error": "died"}:
        others = [said(row) for rank, row in enumerate(ended) if rank != cut["rank"] and row["status"] != "ok"]
        assert others or finished == 9
        # who died may have heard all of a step of which the others had not
        assert on[0]["resumed_at"] is None or on[0]["resumed_at"] >= max([finished - 1, cut["step"], *others])
    else:
        assert [row["status"] for row in ended] == ["ok"] * processes, "all was over before"
    same(anywhere, name, f"whole-{processes}-{kind}")


@pytest.fixture(scope="module")
def otherwise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = Planned(tmp_path_factory.mktemp("otherwise"), WORDS)
    plan.add("whole", 2, "whole", *CARRIED)
    lose(plan, "hung", 2, *CARRIED, rank=0, step=5, how="SIGSTOP")
    lose(plan, "shares", 2, *CARRIED, "parallel.data=fsdp", rank=1, step=5)
    lose(plan, "uncopied", 2, *CARRIED, "parallel.copy_states=false", rank=1, step=5)
    return done(plan)


@pytest.mark.slow
@pytest.mark.long
def test_one_that_hangs_is_outlived_as_well(otherwise: dict[str, Any]) -> None:
    dead, other = otherwise["hung cut"]
    assert dead == {"error": "died"}
    assert said(other) == 5
    assert other["seconds"] < 20 + 60
    assert otherwise["hung on"][0]["resumed_at"] == 5
    same(otherwise, "hung", "whole")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("shares", "its share of the model is gone with it, what is kept is the last checkpoint"),
        ("uncopied", "what its rows carried is gone with it, what is kept is the last checkpoint"),
    ],
)
def test_what_is_gone_with_a_process_is_said(name: str, why: str, otherwise: dict[str, Any]) -> None:
    assert otherwise[f"{name} cut"][0]["status"] == "lost"
    assert why in otherwise[f"{name} cut"][0]["error"]
    row = otherwise[f"{name} on"][0]
    assert row["status"] == "ok", row["error"]
    assert row["resumed_at"] is None
