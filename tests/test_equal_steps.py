"""Every backend of a plan takes the same number of steps, chosen once a folder from timed ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attention_zoo.jobs import steps
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan, _Job
from attention_zoo.jobs.steps import GRID, KEPT, affordable, equal_steps
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery
from attention_zoo.training.timing import timed_steps

TINY = {
    "seq_len": 16,
    "batch": 2,
    "device": "cpu",
    "threads": 1,
    "model": {"dim": 16},
    "task": {"pairs": 2, "vocab": 16},
}
PLAN = TrainingPlan("mqar", set=TINY, seconds=2.0)


def test_as_many_steps_as_fit_and_never_fewer_than_the_smallest() -> None:
    assert list(GRID) == sorted(set(GRID))
    assert affordable([0.1, 0.3], 40.0, parallel=1) == 100
    assert affordable([0.1, 0.3], 39.9, parallel=1) == 75
    assert affordable([0.1, 0.3], 40.0, parallel=2) == 100, "the longest run bounds it, too"
    assert affordable([0.2, 0.2], 40.0, parallel=2) == 200, "two at a time"
    assert affordable([100.0], 1.0, parallel=1) == GRID[0]


def test_all_runs_of_a_plan_are_given_the_number(tmp_path: Path) -> None:
    config = CompareConfig(backends=["full", "longformer"], trainings={"a": PLAN, "a-b": PLAN}, seeds=[0, 1])
    assert {run.config["steps"] for run in config.planned({"a": 30})["a"]} == {30}
    assert len(config.runs({"a": 30})) == 8
    assert {run.config["steps"] for run in config.planned({"a": 30})["a-b"]} == {600}


@pytest.mark.slow
def test_steps_are_timed_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompareConfig(backends=["full", "longformer", "transformer_xl"], trainings={"recall": PLAN})
    job = _Job(config, tmp_path, Console(quiet=True))
    chosen = job.equal_steps()
    kept = json.loads((tmp_path / KEPT).read_text())["recall"]
    assert chosen == {"recall": kept["steps"]}
    assert set(kept["step_seconds"]) == {"full", "longformer", "transformer_xl"}
    assert kept["steps"] == affordable(list(kept["step_seconds"].values()), 2.0, parallel=config.parallel)
    monkeypatch.setattr(steps, "_timed", lambda *_: pytest.fail("timed twice"))
    assert job.equal_steps() == chosen


@pytest.mark.parametrize("change", ["seconds", "parallel", "config", "damaged"])
def test_another_plan_or_a_damaged_note_is_timed_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_timed", lambda configs, parallel: {"full": 0.1})
    configs = [{"backend": "full", "seed": 0}]
    assert equal_steps({"p": (10.0, configs)}, tmp_path, parallel=1) == {"p": 100}
    monkeypatch.setattr(steps, "_timed", lambda configs, parallel: {"full": 0.05})
    assert equal_steps({"p": (10.0, configs)}, tmp_path, parallel=1) == {"p": 100}
    if change == "damaged":
        (tmp_path / KEPT).write_text('{"p": {"steps": 7}')
    other = {"backend": "full", "seed": 1 if change == "config" else 0}
    seconds, parallel = (10.5 if change == "seconds" else 10.0), (2 if change == "parallel" else 1)
    assert equal_steps({"p": (seconds, [other])}, tmp_path, parallel=parallel) == {"p": 200}


class Here(Nursery):
    """Calls within this process."""

    def call(self, function: str, given: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | Ended:
        assert function == "attention_zoo.training.timing:timed_steps"
        return timed_steps(**given)


def test_a_backend_that_cannot_be_trained_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "Nursery", Here)
    plan = TrainingPlan("mqar", set=TINY, seconds=2.0, options={"longformer": {"window": -1}})
    config = CompareConfig(backends=["full"], trainings={"recall": plan})
    configs = [run.config for run in config.runs()]
    broken = {**configs[0], "backend": "broken", "attention": {"name": "longformer", "window": -1}}
    equal_steps({"recall": (2.0, [*configs, broken])}, tmp_path, parallel=1)
    assert set(json.loads((tmp_path / KEPT).read_text())["recall"]["step_seconds"]) == {"full"}
