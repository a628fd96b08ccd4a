"""A trained model under other conditions: the figures of a model that is built so, training untouched."""

import json

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.tasks import Mqar
from attention_zoo.tasks.task import joined
from attention_zoo.training.config import compose_training
from attention_zoo.training.evaluate import evaluate
from attention_zoo.training.pieces import pieces
from attention_zoo.training.precision import Precision
from attention_zoo.training.run import run_training
from attention_zoo.training.timing import timed_steps

WORDS = ["task=mqar", "steps=12", "seq_len=32", "batch=8", "device=cpu", "threads=1", "tracker=none",
         "task.vocab=32", "task.test_examples=40", "trainer.progress=none"]  # fmt: skip


def trained(folder, *words):
    row = run_training(compose_training([*WORDS, *words]), folder)
    assert row["status"] == "ok", row["error"]
    return row


def test_it_is_what_a_model_that_is_built_so_says(tmp_path):
    row = trained(
        tmp_path, "attention=reformer", "attention.chunk=8", "+evaluate_at.same={attention: {rounds: 4}}",
        "+evaluate_at.three={attention: {rounds: 3}}", "+evaluate_at.long={seq_len: 61, attention: {chunk: 64}}",
    )  # fmt: skip
    model, task = zoo.load(tmp_path), Mqar(vocab=32, test_examples=40)
    for layer in model.modules():
        if hasattr(layer, "rounds"):
            layer.rounds = 3
    by_hand = evaluate(
        model, task, task.evaluation_sets(8, 32)["test"], precision=Precision("float32", "cpu"), device="cpu",
        carry=False,
    )  # fmt: skip
    assert row["evaluations"]["test@three"] == by_hand.metrics
    assert row["evaluations"]["test@three"] != row["evaluations"]["test"]
    assert row["by_set"]["test@long"]["seq_len"] == 61
    assert row["by_set"]["test"]["seq_len"] == 32
    assert row["by_set"]["test@three"]["by_group"] == by_hand.by_group


def test_the_same_conditions_are_the_same_figures(tmp_path):
    row = trained(tmp_path, "attention=longformer", "attention.window=8", "+evaluate_at.same={attention: {window: 8}}",
                  "+evaluate_at.length={seq_len: 32, sets: [validation, test]}")  # fmt: skip
    assert row["evaluations"]["test@same"] == row["evaluations"]["test@length"] == row["evaluations"]["test"]
    assert row["evaluations"]["validation@length"] == row["evaluations"]["validation"]


def test_another_mechanism_of_the_same_weights_may_be_asked(tmp_path):
    row = trained(tmp_path, "attention=full", "+evaluate_at.window={attention: {name: longformer, window: 2, "
                  "global_projections: shared}}", "+evaluate_at.wide={attention: {name: longformer, window: 64, "
                  "global_projections: shared}}")  # fmt: skip
    narrow, wide, own = (row["evaluations"][name]["loss"] for name in ("test@window", "test@wide", "test"))
    assert wide == pytest.approx(own, rel=1e-5)
    assert abs(narrow - own) > 1e-3


def test_longer_rows_are_read_by_as_many_tokens_as_a_training_batch_has(tmp_path, monkeypatch):
    seen = []
    forward = zoo.Transformer.forward

    def watched(model, ids, *given, **named):
        seen.append((model.training, *ids.shape))
        return forward(model, ids, *given, **named)

    monkeypatch.setattr(zoo.Transformer, "forward", watched)
    row = trained(tmp_path, "attention=longformer", "task.test=[[32, 2], [127, 2], [300, 2]]",
                  "+evaluate_at.long={seq_len: 61}")  # fmt: skip
    read = {length: {rows for training, rows, each in seen if each == length and not training} for length in (127, 300)}
    assert read == {127: {2}, 300: {1}}
    assert {rows for _, rows, length in seen if length == 61} == {4}
    assert {rows for training, rows, length in seen if length == 32 and not training} == {1, 8}  # 1: what it was given
    monkeypatch.undo()
    model, task = zoo.load(tmp_path), Mqar(vocab=32, test_examples=40, test=[[32, 2], [127, 2], [300, 2]])
    for name, found in row["evaluations"].items():
        if "@" not in name:
            whole = evaluate(model, task, task.evaluation_sets(8, 32)[name], precision=Precision("float32", "cpu"),
                             device="cpu", carry=False)  # fmt: skip
            assert found == pytest.approx(whole.metrics, rel=1e-5)
            of_row = [[group[0], pytest.approx(group[1:], rel=1e-5)] for group in whole.by_group["distance"]]
            assert [[group[0], group[1:]] for group in row["by_set"][name]["by_group"]["distance"]] == of_row


@pytest.mark.parametrize(
    ("length", "processes", "sizes"),
    [(64, 1, [2, 2, 2, 2, 2]), (64, 4, [4, 4, 2]), (12, 4, [10]), (13, 1, [9, 1]), (500, 1, [1] * 10)],
)
def test_pieces_are_all_rows_in_their_order_with_one_for_each_process(length, processes, sizes):
    batch = next(iter(Mqar(vocab=32, test_examples=10).evaluation_sets(10, 16)["test"]))
    batch = batch._replace(ids=batch.ids.repeat(1, 40)[:, :length])
    found = list(pieces([batch], 128, processes))
    assert [len(each.ids) for each in found] == sizes
    assert all(torch.equal(*both) for both in zip(joined(found).tensors(), batch.tensors(), strict=True))


def test_what_is_scored_at_the_end_is_timed_before(tmp_path):
    words = [*WORDS, "attention=full", "task.test=[[64, 2]]", "+evaluate_at.long={seq_len: 512}"]
    told = timed_steps(compose_training(words), 1, wholly=True)
    row = run_training(compose_training(words), tmp_path)
    assert row["scoring_seconds"] / 5 < told["scoring_seconds"] < row["scoring_seconds"] * 5
    assert told["scoring_seconds"] > 2 * told["evaluation_seconds"]


def test_a_long_evaluation_is_timed_by_its_share(monkeypatch):
    words = [*WORDS, "attention=full", "task.test_examples=4000"]
    whole = timed_steps(compose_training(words), 1, wholly=True)["evaluation_seconds"]
    monkeypatch.setattr("attention_zoo.training.timing.EVALUATION_S", whole / 10)
    part = timed_steps(compose_training(words), 1, wholly=True)
    assert whole / 4 < part["evaluation_seconds"] < whole * 4


def test_training_does_not_notice(tmp_path):
    plain = trained(tmp_path / "plain", "attention=reformer", "attention.chunk=8", "model.output_dropout=0.2")
    more = trained(tmp_path / "more", "attention=reformer", "attention.chunk=8", "model.output_dropout=0.2",
                   "+evaluate_at.r={attention: {rounds: 1}}")  # fmt: skip
    assert plain["model_sha256"] == more["model_sha256"]
    assert plain["metrics"] == more["metrics"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{attention: {name: full}}", "its weights must be those of the trained model"),
        ("{attention: {round: 8}}", "round is not supported"),
        ("{attention: {rounds: 0}}", "rounds must be an integer of at least 1, got 0"),
        ("{seq_len: 3}", "seq_len must be at least 16"),
        ("{seq_len: 0}", "seq_len must be an integer of at least 1, got 0"),
        ("{set: 3}", "set is no option; did you mean sets"),
        ("{seq_len: 64, sets: [nope]}", "sets must be among validation, test, got 'nope'"),
        ("{}", "must say attention, seq_len or both"),
        ("3", "must be a mapping such as {seq_len: 2048}, got 3"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, entry, said):
    words = [*WORDS, "attention=reformer", "attention.chunk=8", "optimizer.lr=1e30", f"+evaluate_at.odd={entry}"]
    row = run_training(compose_training(words), tmp_path)
    assert row["status"] == "failed"
    assert row["refused"]
    assert not row["curve"]
    assert row["error"].count("evaluate_at.odd") == 1
    assert said in row["error"]


def test_a_stack_of_several_and_a_file_are_refused(tmp_path):
    config = compose_training([*WORDS, "hybrid=[full,longformer]", "+evaluate_at.w={attention: {window: 8}}"])
    assert "not of init= or hybrid=" in run_training(config, tmp_path)["error"]


def test_more_positions_than_there_are_is_said_before_training(tmp_path):
    config = compose_training([*WORDS, "attention=full", "model.positions=learned", "+model.max_length=40",
                               "+evaluate_at.long={seq_len: 41}"])  # fmt: skip
    row = run_training(config, tmp_path)
    assert row["status"] == "failed"
    assert "40 positions" in row["error"]
    assert not row["curve"]


def test_an_interrupted_run_goes_on_to_the_same_figures(tmp_path):
    words = ("attention=reformer", "attention.chunk=8", "+evaluate_at.r={attention: {rounds: 1}}")
    whole = trained(tmp_path / "whole", *words)
    folder = tmp_path / "part"
    trained(folder, *words, "trainer.checkpoint_every=5")
    (folder / "result.json").unlink()
    (folder / "model.safetensors").unlink()
    again = run_training(compose_training([*WORDS, *words, "trainer.checkpoint_every=5"]), folder)
    assert again["resumed_at"]
    assert again["evaluations"] == whole["evaluations"]
    assert json.loads((folder / "result.json").read_text())["by_set"].keys() == whole["by_set"].keys()
