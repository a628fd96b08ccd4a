"""What a module asks of the trainer: to be called after each step, and to have its readings logged, kept and drawn."""

from __future__ import annotations

import json
from pathlib import Path

from report_page import drawn

from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training


def test_spans_are_clamped_logged_kept_and_drawn(tmp_path: Path) -> None:
    options = ["attention=adaptive_span", "attention.limit=64", "attention.span_loss=10", "task=mqar", "model=tiny"]
    few = ["steps=4", "trainer.eval_every=2", "task.test_examples=8", "tracker=none", "threads=1", "device=cpu"]
    # a loss that heavy moves spans from 0 far below it, were they not put back
    row = run_training(compose_training([*options, *few, "optimizer.lr=0.5", "schedule=constant"]), tmp_path)
    assert row["status"] == "ok", row["error"]
    names = sorted(row["readings"])
    assert len(names) == 2
    assert all(name.endswith(".span") for name in names), names
    for points in row["readings"].values():
        assert [point[0] for point in points] == [2, 4]
        assert all(len(point) == 3 and all(0 <= span <= 64 for span in point[1:]) for point in points)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(f"readings/{names[0]}/1" in str(line) for line in logged)
    (run,) = drawn([dict(row)])["runs"]
    lines = [heads for _, *heads in run["readings"].values()]
    assert [len(heads) for heads in lines] == [2, 2], "a line for each head of each layer"
