"""Rows of every kind: newly made ones have the keys of the committed ones, in their order, and nothing untyped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_budget import CELL, MEASURED, machine
from test_compare import tiny_run
from test_peers import PAIR, Scripted

from attention_zoo.files import plain
from attention_zoo.measure.budget import longest_trainable
from attention_zoo.measure.cell import SpeedCell, blank_row, run_cell
from attention_zoo.measure.cells import run_cells
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.peers import contest
from attention_zoo.report.patterns import portrait, unseen
from attention_zoo.results.check import DRAWN, wrong_to_keep, wrong_with
from attention_zoo.results.row import Environment
from attention_zoo.training.records import lost_row
from attention_zoo.training.run import run_training

COMMITTED = sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("results.jsonl"))
TINY = {"heads": 2, "head_width": 8, "threads": 1}
TRAINING = [
    "kind", "id", "backend", "status", "error", "final", "notices", "environment", "config", "task", "seed", "steps",
    "seq_len", "batch", "parameters", "train_seconds", "step_seconds", "tokens_per_second", "peak_bytes", "curve",
    "quality_curve", "readings", "metrics", "evaluations", "loss_by_position", "metric", "better", "by_group",
    "chance", "baselines", "further_baselines", "carries_state", "stopped", "resumed_at", "data",
    "model_sha256", "refused", "wall_seconds", "scoring_seconds", "by_set", "evaluation_tokens_per_second",
    "given", "regime", "rates", "sent_bytes_per_token",
]  # fmt: skip
LOST = [
    "kind", "id", "backend", "status", "error", "environment", "config", "task", "data", "seed", "seq_len", "batch",
]  # fmt: skip


def committed(kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for path in COMMITTED for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def speed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (found,) = run_cells([SpeedCell("full", 8, **TINY)], folder, repeats=1, budget_s=0.01)
    return found


def peer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(contest, "Stable", Scripted(dict.fromkeys(("longformer", *PAIR[0].rivals), (1.0, 100))))
    return contest.run_contest(PAIR, rounds=2)[0]


def budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return longest_trainable(CELL, MEASURED, 10_000_000, machine(9000, []))


def picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return portrait("full", length=4)


def training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return run_training(tiny_run("one").config, folder)


MADE: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "speed": speed, "peer": peer, "budget": budget, "portrait": picture, "quality": training,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(MADE))
def test_a_new_row_is_of_its_type_and_has_the_keys_of_old_ones_in_their_order(kind, tmp_path, monkeypatch):
    row = plain(MADE[kind](tmp_path, monkeypatch))
    assert row["status"] == "ok", row["error"]
    assert list(row) == (TRAINING if kind == "quality" else list(committed(kind)[0]))
    assert list(row["environment"]) == [name for name in get_type_hints(Environment) if name != "processes"]
    assert wrong_with(row) is None
    assert set(row) <= set(get_type_hints(DRAWN[kind][0])), "a key that its type does not name"
    if kind != "portrait":
        assert wrong_to_keep(row, kind) is None


@pytest.mark.parametrize("kind", list(MADE))
def test_committed_rows_have_no_key_that_their_type_does_not_name(kind):
    assert committed(kind)
    for row in committed(kind):
        assert set(row) <= set(get_type_hints(DRAWN[kind][0]))


def test_work_that_left_no_row_has_one_that_says_why(tmp_path):
    ended = Ended("lost", "ended from outside")
    config = tiny_run("one").config
    lost = plain(lost_row(config, "x", ended, task="mqar", data={}))
    assert list(lost) == LOST
    assert (wrong_with(lost), wrong_to_keep(lost, "quality")) == (None, None)
    dark = plain(unseen("full", 4, {"name": "full"}, ended))
    assert list(dark) == ["kind", "id", "backend", "status", "error", "length", "environment", "config"]
    assert wrong_with(dark) is None
    failed = plain(portrait("longformer", {"window": "wide"}, length=4))
    assert list(failed) == ["id", "config", "kind", "backend", "length", "environment", "status", "error"]
    assert (failed["status"], wrong_with(failed)) == ("failed", None)
    cell = SpeedCell("full", 8, **TINY)
    assert list(blank_row(cell, "timeout", "why")) == list(run_cell(cell, repeats=1, budget_s=0.01))
    refused = run_training({**config, "steps": 0}, tmp_path)
    assert list(refused) == TRAINING
    assert (refused["status"], wrong_with(refused)) == ("failed", None)


def test_scores_that_are_no_numbers_are_kept_and_not_drawn(tmp_path):
    row = run_training(tiny_run("one").config, tmp_path)
    odd = plain({**row, "metrics": {"loss": float("nan")}})
    assert wrong_to_keep(odd, "quality") is None
    assert "metrics.loss: must be a number, got 'nan'" in str(wrong_with(odd))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "peer"}, "kind must be speed, got 'peer'"), ({"environment": None}, "environment: must be"),
        ({"id": None}, "id: must be a string"), ({"status": "failed"}, "error: must be a string, got None"),
        ({"limits": {"timeout_s": 1.0}}, "lacks limits.memory_limit_bytes"), ({"seconds": None}, "seconds: must be"),
        ({"flops": 1.5}, "flops: must be an integer, got 1.5"), ({"held_bytes": -1}, "held_bytes: must be greater"),
    ],
)  # fmt: skip
def test_what_cannot_stand_for_its_work_is_said(change, said):
    row = committed("speed")[0]
    assert wrong_to_keep(row, "speed") is None
    assert said in str(wrong_to_keep({**row, **change}, "speed"))
