"""Equal FLOPs, parameters or keys instead of equal steps; and learning rates that each backend chooses for itself."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attention_zoo.jobs import comparison, rates
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan, _all_of, _Job, ahead
from attention_zoo.jobs.trainings import Run
from attention_zoo.measure.given import flops_per_token, seen_by
from attention_zoo.measure.nursery import Nursery
from attention_zoo.model.parameters import parameter_count
from attention_zoo.results.regime import differs_by_regime
from attention_zoo.training.building import build
from attention_zoo.training.config import options_of
from attention_zoo.training.models import mechanism_of, model_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.regimes import KNOBS, NEAR, WITHIN, changes

TINY: dict[str, Any] = {
    "seq_len": 64,
    "batch": 4,
    "device": "cpu",
    "threads": 1,
    "steps": 500,
    "model": {"dim": 32},
    "task": {"pairs": 2, "vocab": 16, "test_examples": 32},
    "trainer": {"eval_every": 1000, "checkpoint_every": 1000},
}
FEW = ["full", "longformer", "transformer_xl", "reformer"]


class Here(Nursery):
    """Calls within this process."""

    def call(self, function: str, given: dict[str, Any], **how: Any) -> dict[str, Any]:
        assert function == "attention_zoo.training.regimes:changes"
        return changes(**given)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "Nursery", Here)


def planned(backends: list[str] = FEW, **plan: Any) -> list[Run]:
    made = TrainingPlan("mqar", set=TINY, **plan)
    return CompareConfig(backends=backends, trainings={"recall": made}, seeds=[0, 1]).runs()


def model_for(run: Run) -> Any:
    options = options_of(run.config)
    task = build(options.task, "task")
    return model_of(options, mechanism_of(options), task, objective_of(task))


def test_equal_flops_are_equal_flops() -> None:
    runs = planned(regime="flops", options={"longformer": {"window": 4}})
    totals = {run.name: flops_per_token(model_for(run), 64) * run.config["steps"] for run in runs}
    steps = {run.config["backend"]: run.config["steps"] for run in runs}
    assert steps["full"] == 500
    assert steps["longformer"] > 500 > steps["reformer"]
    for total in totals.values():
        assert total == pytest.approx(totals["recall-full-s0"], rel=0.5 / 300)
    assert {run.config["regime"] for run in runs} == {"flops"}


def test_equal_parameters_are_within_two_percent() -> None:
    options = {"longformer": {"global_projections": "separate"}}
    runs = planned(regime="parameters", options=options)
    counts = {run.config["backend"]: parameter_count(model_for(run)) for run in runs}
    before = {run.config["backend"]: parameter_count(model_for(run)) for run in planned(options=options)}
    assert before["longformer"] > 1.1 * before["full"]
    assert before["reformer"] < before["full"]
    for count in counts.values():
        assert abs(count / before["full"] - 1) <= WITHIN
    assert {run.config["steps"] for run in runs} == {500}


@pytest.mark.parametrize("keys", [16])
def test_equal_keys_are_seen(keys: int) -> None:
    backends = ["full", *KNOBS]
    runs = planned(backends, regime="keys", keys=keys, options={"reformer": {"rounds": 1}, "bigbird": {"random": 1}})
    for run in runs[: len(backends)]:
        layer = model_for(run).stack.attentions[0]
        seen = seen_by(layer, 64).keys
        assert seen is not None
        if run.config["backend"] == "full":
            assert seen.mean() == 32.5
        else:
            assert abs(seen.mean() / keys - 1) <= NEAR, run.config["attention"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"regime": "keys"}, "trainings.recall.keys belongs to regime=keys and to no other, got regime=keys"),
        ({"keys": 4.0}, "trainings.recall.keys belongs to regime=keys"),
        ({"regime": "seconds"}, "trainings.recall.regime=seconds needs seconds"),
        ({"regime": "seconds", "seconds": 3.0}, "and steps that are chosen, got seconds=3.0 and set.steps=500"),
        ({"regime": "state"}, "trainings.recall.regime must be "),
        ({"regime": "flops", "against": "bigbird"}, "trainings.recall.against must be one of the backends that take"),
        ({"regime": "keys", "keys": 60.0}, "trainings.recall: regime=keys: no options of longformer let a query of 64"),
        ({"rates": []}, "trainings.recall.rates must be different rates, one or more"),
        ({"rates": [1e-3, 1e-3]}, "trainings.recall.rates must be different rates, one or more"),
    ],
)
def test_what_does_not_go_together_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(["full", "longformer"], **plan)


@pytest.mark.parametrize("name", ["memory_compressed", "adaptive_span"])
def test_keys_of_what_has_no_such_option_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"regime=keys knows no options of {name} by which keys can be chosen"):
        planned(["full", name], regime="keys", keys=8.0)


@pytest.mark.parametrize(
    ("said", "key", "may"),
    [
        ({"regime": "steps"}, "steps", False),
        ({"regime": "flops"}, "steps", True),
        ({"regime": "seconds"}, "steps", True),
        ({"regime": "flops"}, "optimizer.lr", False),
        ({"regime": "steps", "rates": {"tried": [1, 2]}}, "optimizer.lr", True),
        ({"regime": "parameters"}, "model.feed_forward.width", True),
        ({"regime": "parameters"}, "model.feed_forward_norm", False),
        ({}, "steps", False),
    ],
)
def test_a_row_says_what_its_regime_lets_differ(said: dict[str, Any], key: str, may: bool) -> None:
    assert differs_by_regime(said, key) == may


RATES = [1e-3, 3e-3, 1e-2]


def test_every_backend_tries_every_rate_with_one_seed() -> None:
    runs = planned(["full", "longformer"])
    tried = rates.tried(runs, RATES)
    assert [run.name for run in tried[:3]] == [f"recall-full-s0-lr{rate:g}" for rate in RATES]
    assert len(tried) == 6
    assert {run.config["seed"] for run in tried} == {0}
    assert [run.config["optimizer"]["lr"] for run in tried] == RATES * 2
    assert all(run.config["rates"] == RATES for run in tried)


def row(validation: float, test: float, **rest: Any) -> dict[str, Any]:
    sets = {"validation": {"accuracy": validation}, "test": {"accuracy": test}}
    return {"status": "ok", "metric": "accuracy", "better": "higher", "evaluations": sets, **rest}


def test_validation_chooses_and_the_other_seeds_follow() -> None:
    runs = planned(["full", "longformer"])
    rows = {
        "recall-full-s0-lr0.001": row(0.3, 0.9),
        "recall-full-s0-lr0.003": row(0.5, 0.1),
        "recall-full-s0-lr0.01": {"status": "failed", "error": "diverged"},
        "recall-longformer-s0-lr0.001": row(0.4, 0.2),
        "recall-longformer-s0-lr0.003": row(0.4, 0.8),
        "recall-longformer-s0-lr0.01": row(0.1, 0.99),
    }
    best = rates.chosen(runs, RATES, rows)
    assert best == {"full": 3e-3, "longformer": 1e-3}
    final = rates.with_rates(runs, RATES, best)
    assert [run.name for run in final] == [
        "recall-full-s0-lr0.003", "recall-longformer-s0-lr0.001", "recall-full-s1", "recall-longformer-s1",
    ]  # fmt: skip
    assert [run.config["optimizer"]["lr"] for run in final] == [3e-3, 1e-3, 3e-3, 1e-3]
    tried = {run.name: run for run in rates.tried(runs, RATES)}
    assert all(run == tried[run.name] for run in final[:2]), "these are trained already"
    lower = {name: {**each, "better": "lower"} for name, each in rows.items()}
    assert rates.chosen(runs, RATES, lower) == {"full": 1e-3, "longformer": 1e-2}
    assert rates.chosen(runs, RATES, {}) == {"full": 1e-3, "longformer": 1e-3}


def quick(folder: Path) -> CompareConfig:
    few = {**TINY, "steps": 2, "model": {"dim": 16}}
    plan = TrainingPlan("mqar", set=few, rates=[1e-3, 1e-2])
    config = CompareConfig(backends=["full"], trainings={"recall": plan}, seeds=[0, 1], parallel=1, output=str(folder))
    config.measure.lengths = [32]
    config.measure.budget_s = 0.05
    config.measure.repeats = 1
    return config


def test_trainings_that_choose_are_counted() -> None:
    config = quick(Path("unused"))
    (runs,) = config.planned().values()
    assert len(runs) == 2
    assert [run.name for run in _all_of(config, "recall", runs)] == [
        "recall-full-s0-lr0.001", "recall-full-s1", "recall-full-s0-lr0.01",
    ]  # fmt: skip


@pytest.mark.slow
def test_rates_are_tried_once_and_the_row_says_so(tmp_path: Path) -> None:
    assert "3 trainings" in ahead(quick(tmp_path))
    job = _Job(quick(tmp_path), tmp_path, Console(quiet=True))
    job.run([], {})
    trained = [each for each in job.rows if each["kind"] == "quality"]
    assert [each["seed"] for each in trained] == [0, 1]
    assert job.trainings == 3
    for each in trained:
        assert each["status"] == "ok", each["error"]
        assert each["rates"]["tried"] == [1e-3, 1e-2]
        assert each["rates"]["judged_on"] == "validation"
        assert each["rates"]["chosen"] == each["config"]["optimizer"]["lr"] == trained[0]["rates"]["chosen"]
    again = _Job(quick(tmp_path), tmp_path, Console(quiet=True))
    again.run([], {})
    assert again.again == 3
    assert again.trainings == 3
    assert "3 trainings, 3 of them finished" in ahead(quick(tmp_path))
