"""Whole runs of several processes: cut off, damaged, in another number of processes; the row is as of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import Planned

import attention_zoo as zoo

WORDS = [
    "task=text", "task.held_out=null", "task.evaluation_rows=3", "task.span=3", "seq_len=12", "batch=8", "steps=9",
    "trainer.eval_every=4", "trainer.checkpoint_every=2", "trainer.log_every=1", "parallel.timeout_s=20",
    "attention=transformer_xl", "attention.segment_length=5", "attention.memory_length=7",
]  # fmt: skip
"""Rows take whole spans: they start anew together, so that what they carry can be divided anew."""
KILLED = {"rank": None, "step": 7, "how": "SIGKILL"}
"""Two checkpoints are there then, of steps 4 and 6."""


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("runs")
    plan, shared = Planned(place, WORDS), "parallel.data=fsdp"
    plan.add("whole", 1, "whole", shared)
    plan.add("cut", 2, "cut", shared, cut=KILLED)
    plan.add("on", 1, "cut", shared, damage="torn")
    plan.add("cut file", 1, "file", shared, cut=KILLED)
    plan.add("on file", 2, "file", shared)
    return place, plan.done()


def near(row: dict[str, Any], whole: dict[str, Any]) -> None:
    assert row["status"] == "ok", row["error"]
    assert row["steps"] == whole["steps"]
    assert row["id"] == whole["id"]
    assert [at for at, _ in row["curve"]] == [at for at, _ in whole["curve"]]
    assert [x for _, x in row["curve"]] == pytest.approx([x for _, x in whole["curve"]], rel=1e-5)
    assert row["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
    assert row["given"] == whole["given"]
    assert row["parameters"] == whole["parameters"]


def test_a_torn_checkpoint_of_two_processes_goes_on_in_one_from_the_one_before(fast: Any) -> None:
    _, found = fast
    assert found["cut"] == [{"error": "died"}] * 2
    (row,), (whole,) = found["on"], found["whole"]
    assert row["resumed_at"] == 4
    (said,) = row["notices"]
    assert "is damaged" in said
    assert "checkpoint.processes.before, the one before, is taken: goes on after step 4" in said
    near(row, whole)


def test_a_file_of_one_process_goes_on_in_two(fast: Any) -> None:
    place, found = fast
    first, second = found["on file"]
    assert first["resumed_at"] == 6
    assert first["notices"] == []
    near(first, found["whole"][0])
    assert first["curve"] == second["curve"]
    assert sorted(path.name for path in (place / "file").glob("checkpoint*")) == [
        "checkpoint.processes", "checkpoint.processes.before",
    ], "one of the other kind would be an older one"  # fmt: skip


def test_the_model_of_shares_is_saved_whole(fast: Any) -> None:
    place, _ = fast
    one, other = (zoo.load(place / name / "model.safetensors").state_dict() for name in ("whole", "file"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan, dropped = Planned(tmp_path_factory.mktemp("runs"), WORDS), "model.output_dropout=0.1"
    for data in ("ddp", "fsdp"):
        words = (f"parallel.data={data}", dropped)
        plan.add(f"whole {data}", 2, f"whole-{data}", *words)
        plan.add(f"killed {data}", 2, f"killed-{data}", *words, cut={"rank": 1, "step": 5, "how": "SIGKILL"})
        plan.add(f"killed on {data}", 2, f"killed-{data}", *words)
        plan.add(f"asked {data}", 2, f"asked-{data}", *words, cut={"rank": 1, "step": 5, "how": "SIGTERM"})
        plan.add(f"asked on {data}", 2, f"asked-{data}", *words)
        plan.add(f"hung {data}", 2, f"hung-{data}", *words, cut={"rank": 1, "step": 5, "how": "SIGSTOP"}, left_s=3.0)
    plan.add("one", 1, "one", "parallel.data=fsdp")
    plan.add("cut", 2, "cut", "parallel.data=fsdp", cut=KILLED)
    plan.add("four", 4, "cut", "parallel.data=fsdp")
    plan.add("refused", 2, "refused", "batch=7")
    return plan.done()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("data", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["killed", "asked"])
def test_as_many_processes_go_on_to_the_same_bits(data: str, how: str, slow: dict[str, Any]) -> None:
    whole, cut, row = slow[f"whole {data}"][0], slow[f"{how} {data}"], slow[f"{how} on {data}"][0]
    assert whole["status"] == "ok", whole["error"]
    assert row["status"] == "ok", row["error"]
    if how == "killed":
        assert cut[0]["status"] == "lost"
        assert "another process of the run is gone" in cut[0]["error"]
        # who holds the whole model saves the step before; of shares there is the last checkpoint
        assert row["resumed_at"] == {"ddp": 5, "fsdp": 4}[data]
    else:
        assert [each["status"] for each in cut] == ["stopped by SIGTERM"] * 2
        assert row["resumed_at"] == 6, "the step in flight was ended and saved"
    for name in ("curve", "quality_curve", "metrics", "evaluations", "model_sha256", "id", "steps"):
        assert row[name] == whole[name], name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("data", ["ddp", "fsdp"])
def test_a_process_that_hangs_is_waited_for_as_long_as_is_said(data: str, slow: dict[str, Any]) -> None:
    first, second = slow[f"hung {data}"]
    assert second == {"error": "died"}
    assert first["status"] == "lost"
    assert "has not answered within parallel.timeout_s=20" in first["error"]
    assert first["seconds"] < 20 + 60, "and what a busy machine needs to begin"


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_go_on_from_two(slow: dict[str, Any]) -> None:
    for row in slow["four"]:
        assert row["resumed_at"] == 6
        assert row["notices"] == []
        near(row, slow["one"][0])


@pytest.mark.slow
@pytest.mark.long
def test_what_cannot_be_shared_is_refused_before_training(slow: dict[str, Any]) -> None:
    for row in slow["refused"]:
        assert row["refused"]
        assert row["error"] == "batch must be a multiple of the 2 processes that share its rows, got 7"
