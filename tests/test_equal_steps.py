"""Every backend of a plan takes the same number of steps, chosen once a folder from timed ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attention_zoo.jobs import steps
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan, _Job
from attention_zoo.jobs.steps import GRID, KEPT, Asked, affordable, equal_steps
from attention_zoo.jobs.trainings import Run
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.nursery import Nursery
from attention_zoo.training.run import run_identity
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
    runs = [Run("p", {"backend": "full", "seed": 0, "steps": 600})]
    assert equal_steps({"p": Asked(10.0, runs)}, tmp_path, parallel=1) == {"p": 100}
    monkeypatch.setattr(steps, "_timed", lambda configs, parallel: {"full": 0.05})
    assert equal_steps({"p": Asked(10.0, runs)}, tmp_path, parallel=1) == {"p": 100}
    if change == "damaged":
        (tmp_path / KEPT).write_text('{"p": {"steps": 7}')
    other = Run("p", {"backend": "full", "seed": 1 if change == "config" else 0, "steps": 600})
    seconds, parallel = (10.5 if change == "seconds" else 10.0), (2 if change == "parallel" else 1)
    assert equal_steps({"p": Asked(seconds, [other])}, tmp_path, parallel=parallel) == {"p": 200}


class Here(Nursery):
    """Calls within this process."""

    def call(self, function: str, given: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | Ended:
        assert function == "attention_zoo.training.timing:timed_steps"
        return timed_steps(**given)


def test_a_backend_that_cannot_be_trained_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "Nursery", Here)
    plan = TrainingPlan("mqar", set=TINY, seconds=2.0, options={"longformer": {"window": -1}})
    config = CompareConfig(backends=["full"], trainings={"recall": plan})
    runs = config.runs()
    broken = Run("b", {**runs[0].config, "backend": "broken", "attention": {"name": "longformer", "window": -1}})
    equal_steps({"recall": Asked(2.0, [*runs, broken])}, tmp_path, parallel=1)
    assert set(json.loads((tmp_path / KEPT).read_text())["recall"]["step_seconds"]) == {"full"}


def clock(factor: float) -> Any:
    """Timed steps on a machine that is slower by a factor: a backend takes what it takes there."""
    steps_of = {"full": 0.011, "longformer": 0.013, "transformer_xl": 0.017}

    class Slow(Nursery):
        def call(self, function: str, given: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | Ended:
            assert given["steps"] == steps.TIMED
            return {"seconds": [factor * steps_of[given["config"]["backend"]] * noise for noise in (1.05, 1, 0.97)]}

    return Slow


def comparison(**options: Any) -> CompareConfig:
    plan = TrainingPlan("mqar", set=options.pop("set", TINY), **{"seconds": 60.0, **options})
    return CompareConfig(backends=["full", "longformer", "transformer_xl"], trainings={"recall": plan}, seeds=[0, 1])


def chosen_on(factor: float, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Run]:
    monkeypatch.setattr(steps, "Nursery", clock(factor))
    job = _Job(comparison(**options), folder, Console(quiet=True))
    return job.config.runs(job.equal_steps())


def test_a_machine_three_times_slower_trains_fewer_steps_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = chosen_on(1.0, tmp_path / "here", monkeypatch)
    slower = chosen_on(3.0, tmp_path / "slower", monkeypatch)
    assert {run.config["steps"] for run in here} == {1000}
    assert {run.config["steps"] for run in slower} == {300}
    assert len(here) == len(slower) == 6
    noisy = chosen_on(1.15, tmp_path / "noisy", monkeypatch)
    assert {run.config["steps"] for run in noisy} == {1000}, "a little slower chooses the same"


def test_a_choice_is_repeated_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = chosen_on(3.0, tmp_path / "there", monkeypatch)
    given = {**TINY, "steps": 300}
    monkeypatch.setattr(steps, "_timed", lambda *_: pytest.fail("timed, though the steps were given"))
    again = chosen_on(1.0, tmp_path / "again", monkeypatch, set=given)
    assert [(run.name, run.config) for run in again] == [(run.name, run.config) for run in there]
    assert [run_identity(run.config) for run in again] == [run_identity(run.config) for run in there]
    fewer = chosen_on(1.0, tmp_path / "fewer", monkeypatch, set={**TINY, "steps": 200})
    assert run_identity(fewer[0].config) != run_identity(there[0].config)


def test_equal_seconds_give_each_as_many_steps_as_it_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = chosen_on(1.0, tmp_path, monkeypatch, regime="seconds", seconds=120.0)
    counts = {run.config["backend"]: run.config["steps"] for run in runs}
    assert counts == {"full": 3000, "longformer": 3000, "transformer_xl": 2000}  # 40 s each, two at a time
    assert {run.config["regime"] for run in runs} == {"seconds"}


def test_only_the_main_job_chooses_its_steps() -> None:
    """Other presets fix theirs, so that they are the same on every machine."""
    for path in sorted((Path(__file__).parent.parent / "conf" / "preset").glob("*.yaml")):
        chooses = [line for line in path.read_text().splitlines() if line.strip().startswith("seconds:")]
        assert bool(chooses) == (path.stem == "default"), path.name
