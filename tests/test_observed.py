"""The peak memory of a training on a CPU."""

import os
import subprocess
import sys

import pytest

from attention_zoo.measure.memory import _without_its_notes
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

WORDS = ["task=mqar", "steps=3", "seq_len=64", "batch=4", "device=cpu", "threads=1", "tracker=none",
         "task.test_examples=8", "trainer.progress=none", "task.vocab=32"]  # fmt: skip


def peak(folder, *words):
    row = run_training(compose_training([*WORDS, *words]), folder)
    assert row["status"] == "ok", row["error"]
    return row["peak_bytes"], row["parameters"]


def test_weights_gradients_and_the_optimizers_state_are_in_it(tmp_path):
    """Of a wide model and few tokens these four are nearly all; AdamW's step needs little besides."""
    found, parameters = peak(tmp_path, "seq_len=16", "batch=1", "model.dim=512")
    assert 4 * 4 * parameters <= found <= 6 * 4 * parameters


@pytest.mark.parametrize(("attention", "grows"), [("full", 2.0), ("longformer", 2.0)])
def test_what_a_step_keeps_for_its_backward_grows_with_the_batch(tmp_path, attention, grows):
    one, two, four = (
        peak(tmp_path / str(batch), f"attention={attention}", f"batch={batch}")[0] for batch in (8, 16, 32)
    )
    assert (four - two) / (two - one) == pytest.approx(grows, rel=0.15)
    logits = 8 * 64 * 32 * 4
    assert two - one > logits


def test_figures_and_weights_are_those_of_a_run_that_nobody_observed(tmp_path, monkeypatch):
    observed = run_training(compose_training(WORDS), tmp_path / "observed")
    monkeypatch.setattr("attention_zoo.training.run.observed_step", lambda trainer, history: trainer.step())
    alone = run_training(compose_training(WORDS), tmp_path / "alone")
    assert observed["peak_bytes"] is not None
    assert alone["peak_bytes"] is None
    assert observed["model_sha256"] == alone["model_sha256"]
    assert observed["evaluations"] == alone["evaluations"]


def test_nothing_is_said_of_it_on_the_terminal(tmp_path):
    """Of a process that has never profiled before: some lines are written once in each."""
    words = [*WORDS, f"output={tmp_path}"]
    command = [sys.executable, "-m", "attention_zoo", "train", *words]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "profil" not in said.stderr


def test_what_others_say_meanwhile_is_not_lost(capfd):
    def loud():
        os.write(2, b"mind the gap\n")

    with _without_its_notes():
        os.write(2, b"USDT:2026 profiler_start\n")
        loud()
    assert capfd.readouterr().err == "mind the gap\n"
