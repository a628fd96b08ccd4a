"""A checkpoint whose digest is right, and that no run of this project has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attention_zoo.training.checkpoint import load_checkpoint, save_checkpoint
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.run import run_identity, run_training


def changed(content: Any, place: str, value: Any) -> Any:
    """A copy with one value replaced, named by its keys."""
    key, _, rest = place.partition(".")
    keys = {str(key): key for key in (content if isinstance(content, dict) else range(len(content)))}
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[keys[key]] = changed(copy[keys[key]], rest, value) if rest else value
    return copy


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The config and the folder of a run of two steps."""
    words = "task=mqar attention=full model.dim=8 model.heads=2 model.depth=1 steps=2 seq_len=32 batch=2 threads=1"
    small = ["task.pairs=2", "task.test_examples=4", "tracker=none", "trainer.progress=none"]
    config = compose_training([*words.split(), *small])
    folder = tmp_path_factory.mktemp("two_steps")
    assert run_training(config, folder)["status"] == "ok"
    return config, folder


@pytest.mark.parametrize(("place", "value"), [
    ("data", torch.zeros(2)),
    ("lines", -1),
    ("trainer.step", None), ("trainer.step", 10**9), ("trainer.step", -1), ("trainer.step", float("nan")),
    ("trainer.carried", []), ("trainer.batches.step", "x"),
    ("trainer.optimizer.param_groups.0.eps", 1.0), ("trainer.optimizer.param_groups.0.params", []),
    ("trainer.optimizer.state.0.exp_avg", torch.zeros(3)), ("trainer.optimizer.state.0.exp_avg_sq", "x"),
    ("trainer.optimizer.state.0.step", torch.tensor(float("nan"))), ("trainer.optimizer.state.0", {}),
    ("history.curve", [1, 2]), ("history.settled", 10**9), ("history.train_seconds", -1.0), ("history.best", "x"),
    ("history.seconds", float("nan")), ("history.stopped", 3),
])  # fmt: skip
def test_a_sealed_checkpoint_with_a_foreign_value(
    place: str, value: Any, two_steps: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """What no run of ours writes neither trains on nor is trained on, and the next call tries again."""
    config, folder = two_steps
    own = load_checkpoint(folder / "checkpoint.pt", run_identity(check(config)))
    save_checkpoint(tmp_path / "checkpoint.pt", changed(own, place, value))
    row = run_training(config, tmp_path)
    if place == "data":
        assert (row["status"], row["resumed_at"]) == ("ok", None), "of other data: afresh"
    else:
        assert (row["status"], row["final"]) == ("failed", False)
        assert "is no checkpoint of this project" in row["error"]
        assert row["error"].endswith("use force=true to start afresh")


class Harmful:
    """What runs code of its own where it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", {"identity": "x", "gift": Harmful(tmp_path / "proof")})
    with pytest.raises(ValueError, match="is no checkpoint of this project"):
        load_checkpoint(tmp_path / "checkpoint.pt", "x")
    assert not (tmp_path / "proof").exists()
