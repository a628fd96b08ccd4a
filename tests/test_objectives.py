"""What models are trained for: losses by name, evaluation by groups, halves, and runs that start from a file."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attention_zoo as zoo
from attention_zoo.model.heads import PretrainingLogits
from attention_zoo.tasks.generated import Generated, GeneratedBatches, of
from attention_zoo.tasks.task import IGNORED, Batch, joined
from attention_zoo.training.config import BESIDE_INIT, compose_training
from attention_zoo.training.evaluate import evaluate
from attention_zoo.training.objective import OBJECTIVES, answers, counts, losses, objective_of
from attention_zoo.training.precision import Precision
from attention_zoo.training.run import run_training

BOS, EOS = 0, 1


class Reversal(Generated):
    """The first four tokens of a source, backwards."""

    name, objective, metric, better = "reversal", "seq2seq", "exact_match", "higher"
    vocab, test_examples = 12, 24

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        source = random.integers(2, self.vocab, (rows, length))
        valid = np.arange(length) < random.integers(4, length + 1, (rows, 1))
        asked = source[:, 3::-1]
        ids = np.concatenate([np.full((rows, 1), BOS), asked], 1)
        return of(ids, np.concatenate([asked, np.full((rows, 1), EOS)], 1), source=source, source_valid=valid)


class Odd(Generated):
    """Hidden tokens are asked for, and whether the first one is odd."""

    name, objective, metric, better = "odd", "masked_lm", "accuracy", "higher"
    vocab, classes, test_examples = 12, 2, 24

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        ids = random.integers(1, self.vocab, (rows, length))
        hidden = random.random((rows, length)) < 0.3
        return of(
            np.where(hidden, 0, ids), np.where(hidden, ids, IGNORED), types=ids % 2, labels={"order": ids[:, 0] % 2},
            groups={"place": np.broadcast_to(np.arange(length), ids.shape)},
        )  # fmt: skip

    def guesses(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"always one": torch.ones_like(batch.targets)}

    def chance(self, seq_len: int) -> float:
        return 1 / (self.vocab - 1)


class First(Odd):
    """Whether the first token is odd."""

    name, objective = "first", "classify"

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        ids = random.integers(1, self.vocab, (rows, length))
        return of(ids, ids[:, 0] % 2)


class Each(Odd):
    """Whether each token is odd."""

    name, objective = "each", "label"

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        ids = random.integers(1, self.vocab, (rows, length))
        return of(ids, ids % 2)


class Next(Odd):
    """The next of random tokens."""

    name, objective, classes = "next", "causal_lm", None

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        ids = random.integers(1, self.vocab, (rows, length + 1))
        return of(ids[:, :-1], ids[:, 1:])


TASKS = {task.objective: task for task in (Reversal, Odd, First, Each, Next)}


@cache
def composed() -> dict[str, Any]:
    return compose_training(["tracker=none", "trainer.progress=none", "threads=1", "steps=3", "batch=8", "seq_len=12"])


def config(task: type, folder: Path, **changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(composed())
    found |= {"task": {"_target_": f"{__name__}.{task.__name__}", "_partial_": True}, "output": str(folder)}
    found["model"] = {**found["model"], "dim": 16, "short_conv": 0, "embedding": {"types": 2}}
    if task is Reversal:
        found["model"].pop("embedding")
    if "init" in changes:  # as composing does it
        kept = {key: value for key, value in found["model"].items() if key in BESIDE_INIT}
        found |= {"attention": None, "model": kept}
    return {**found, **changes}


def trained(task: type, folder: Path, **changes: Any) -> dict[str, Any]:
    row = run_training(config(task, folder, **changes), folder)
    assert row["status"] == "ok", row["error"]
    return dict(row)


# --- losses and evaluation -------------------------------------------------------------------------------------------


def test_every_objective_has_a_task_here() -> None:
    assert set(TASKS) == set(OBJECTIVES)


def test_an_unknown_objective_is_named() -> None:
    class Wrong(First):
        objective = "classifi"

    with pytest.raises(ValueError, match=r"Wrong.objective must be one of .*, got 'classifi'.*classify"):
        objective_of(Wrong())


def test_parts_of_a_batch_add_up_to_its_losses() -> None:
    task = Odd()
    batch = next(task.train_batches(6, 12, 0))
    logits = PretrainingLogits(torch.randn(6, 12, 12), torch.randn(6, 2))
    output = zoo.model.transformer.ModelOutput(logits, torch.zeros(6, 12, 1), None, {})
    whole = losses(output, batch, counts(batch))
    scored = batch.targets != IGNORED
    by_hand = -logits.tokens.log_softmax(-1)[scored].gather(1, batch.targets[scored][:, None]).mean()
    assert torch.allclose(whole["main"], by_hand)
    label = batch.labels["order"]
    assert torch.allclose(whole["order"], -logits.row.log_softmax(-1).gather(1, label[:, None]).mean())
    total = dict.fromkeys(whole, torch.zeros(()))
    for part in (slice(0, 2), slice(2, 6)):
        of_part = output._replace(logits=PretrainingLogits(logits.tokens[part], logits.row[part]))
        for name, loss in losses(of_part, batch.rows(part), counts(batch)).items():
            total[name] = total[name] + loss
    for name, loss in whole.items():
        assert torch.allclose(total[name], loss)
    assert answers(output, batch)["order"].hits.tolist() == (logits.row.argmax(-1) == label).tolist()


def test_metrics_by_group_are_those_of_its_tokens() -> None:
    task = Odd()
    model = zoo.Transformer(
        attention="full", vocab=12, dim=16, heads=2, causal=False, head="pretraining", classes=2, embedding={"types": 2}
    )
    batches = list(task.evaluation_sets(9, 40)["test"])
    found = evaluate(model, task, batches, precision=Precision("float32", "cpu"), device="cpu", carry=False)
    assert found is not None
    whole = joined(batches)
    with torch.no_grad():
        logits = model.eval()(whole.ids, types=whole.types).logits
    hit, asked = logits.tokens.argmax(-1) == whole.targets, whole.targets != IGNORED
    assert found.metrics["accuracy"] == pytest.approx(float(hit[asked].double().mean()))
    assert found.metrics["order_accuracy"] == pytest.approx(
        float((logits.row.argmax(-1) == whole.labels["order"]).double().mean())
    )
    place = whole.groups["place"]
    first = 0
    for last, accuracy, _, number in found.by_group["place"]:  # 40 of them: in bins that double
        inside = asked & (place >= first) & (place <= last)
        assert number == int(inside.sum())
        assert accuracy == pytest.approx(float(hit[inside].double().mean()))
        first = int(last) + 1
    assert first >= 40


# --- encoder and decoder ---------------------------------------------------------------------------------------------


def halves(**options: Any) -> Any:
    shared = {"attention": "full", "vocab": 12, "dim": 16, "heads": 2, **options}
    return zoo.EncoderDecoder(
        encoder=zoo.Transformer(**shared, causal=False, head="hidden"), decoder=zoo.Transformer(**shared, cross=True)
    )


def test_exact_match_is_what_a_greedy_loop_writes_and_the_encoder_runs_once() -> None:
    task, model = Reversal(), halves().double()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    batches = list(task.evaluation_sets(10, 12)["test"])
    with torch.no_grad():  # answers at random are never right: let the first token of each row be the model's own
        for index, batch in enumerate(batches):
            ids = batch.ids[:, :1]
            for _ in range(batch.targets.shape[1]):
                logits = model.eval()(ids, source=(batch.source, batch.source_tokens)).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            right = torch.arange(len(ids)) % 2 == 0
            targets = ids[:, 1:].clone()
            targets[:, -1] = torch.where(right, targets[:, -1], (targets[:, -1] + 1) % 12)  # one wrong token is enough
            batches[index] = batch._replace(targets=targets)
    calls.clear()
    found = evaluate(model, task, batches, precision=Precision("float32", "cpu"), device="cpu", carry=False)
    assert found is not None
    assert len(calls) == len(batches)
    assert found.metrics["exact_match"] == pytest.approx(sum((len(b.ids) + 1) // 2 for b in batches) / 24)


def test_each_half_takes_its_own_mechanism(tmp_path: Path) -> None:
    sides = {
        "encoder": {"attention": "bigbird"},
        "decoder": {"attention": {"name": "longformer", "window": 4}, "depth": 1},
    }
    row = trained(Reversal, tmp_path, **sides, backend=None)
    model = zoo.load(tmp_path)
    assert [entry["name"] for entry in model.config["encoder"]["attention"]] == ["bigbird"]
    assert model.config["decoder"]["attention"] == [{"name": "longformer", "window": 4}]
    assert (model.config["encoder"]["depth"], model.config["decoder"]["depth"]) == (2, 1)
    assert {"accuracy", "exact_match"} <= row["metrics"].keys()


def test_a_half_that_a_mechanism_cannot_be_is_refused_with_those_that_can(tmp_path: Path) -> None:
    row = run_training(config(Reversal, tmp_path, encoder={"attention": "transformer_xl"}), tmp_path)
    assert row["status"] == "unsupported"
    assert "encoder.attention=transformer_xl" in row["error"]
    able = row["error"].partition("decoder: ")[2]
    assert all(name in able for name in ("bigbird", "full", "longformer", "reformer", "transformer_xl"))


def test_halves_are_refused_where_there_is_one_model(tmp_path: Path) -> None:
    row = run_training(config(Next, tmp_path, decoder={"depth": 1}), tmp_path)
    assert "decoder.depth (model=encoder_decoder has some) belongs to tasks whose rows have a source" in row["error"]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_run_resumes_to_the_same_weights(objective: str, tmp_path: Path) -> None:
    task = TASKS[objective]
    whole = trained(task, tmp_path / "whole", steps=4)
    batches, given = GeneratedBatches.__next__, []

    def cut(self: GeneratedBatches) -> Batch:
        given.append(1)
        if len(given) == 3:
            raise OSError("cut")
        return batches(self)

    again = config(task, tmp_path / "cut", steps=4)
    again["trainer"]["checkpoint_every"] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratedBatches, "__next__", cut)
        assert run_training(again, tmp_path / "cut")["status"] == "failed"
    row = run_training(again, tmp_path / "cut")
    assert row["status"] == "ok"
    assert row["resumed_at"] == 2
    assert row["model_sha256"] == whole["model_sha256"]
    assert row["metrics"] == whole["metrics"]


def test_a_row_holds_what_its_figures_are_to_be_held_against(tmp_path: Path) -> None:
    row = trained(Odd, tmp_path)
    assert row["chance"] == pytest.approx(1 / 11)
    assert row["baselines"]["always one"] == pytest.approx(1 / 11, abs=0.06)
    assert row["metrics"] == row["evaluations"]["test"]
    assert row["by_group"]["place"][0][0] == 0
    assert json.loads(json.dumps(row)) == row


# --- from a file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["causal_lm", "classify", "label", "seq2seq"])
def test_a_decoder_is_tuned_to_each_task_that_it_can_do(objective: str, tmp_path: Path) -> None:
    trained(Next, tmp_path / "first")
    trained(TASKS[objective], tmp_path / "second", init=str(tmp_path / "first"))
    before, after = zoo.load(tmp_path / "first"), zoo.load(tmp_path / "second")
    after = after.decoder if objective == "seq2seq" else after
    assert after.config["attention"] == before.config["attention"]
    moved = after.embedding.weight - before.embedding.weight
    assert 0 < float(moved.detach().abs().max()) < 0.1, "three steps from where the file was"


@pytest.mark.parametrize("objective", ["masked_lm", "classify", "label", "seq2seq"])
def test_an_encoder_is_tuned_to_each_task_that_it_can_do(objective: str, tmp_path: Path) -> None:
    trained(Odd, tmp_path / "first")
    trained(TASKS[objective], tmp_path / "second", init=str(tmp_path / "first"))
    before, after = zoo.load(tmp_path / "first"), zoo.load(tmp_path / "second")
    after = after.encoder if objective == "seq2seq" else after
    moved = after.embedding.weight - before.embedding.weight
    assert 0 < float(moved.detach().abs().max()) < 0.1


def test_ids_and_types_that_a_file_lacks_are_added_behind_its_own(tmp_path: Path) -> None:
    small = zoo.Transformer(attention="full", vocab=7, dim=16, heads=2, causal=False)
    zoo.save(small, tmp_path / "small.safetensors")
    run = config(First, tmp_path / "run", init=str(tmp_path / "small.safetensors"))
    run["optimizer"]["lr"] = 0.0
    assert run_training(run, tmp_path / "run")["status"] == "ok"
    grown = zoo.load(tmp_path / "run")
    assert (grown.vocab, grown.types) == (12, 2)
    assert torch.equal(grown.embedding.weight[:7], small.embedding.weight)


def test_a_file_of_another_direction_is_refused(tmp_path: Path) -> None:
    zoo.save(zoo.Transformer(attention="full", vocab=12, dim=16, heads=2), tmp_path / "causal.safetensors")
    row = run_training(config(Odd, tmp_path / "run", init=str(tmp_path / "causal.safetensors")), tmp_path / "run")
    assert "holds a model that sees the past only, got task odd of objective masked_lm" in row["error"]


def test_lora_trains_adapters_and_fresh_parts_alone_and_the_file_needs_no_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trained(Odd, tmp_path / "first")
    trained(First, tmp_path / "second", init=str(tmp_path / "first"), lora={"r": 2}, steps=6)
    before, after = zoo.load(tmp_path / "first"), zoo.load(tmp_path / "second")
    kept = dict(before.named_parameters())
    moved = {n for n, p in after.named_parameters() if n not in kept or not torch.equal(p, kept[n])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "linear",
    }
    assert all(name.endswith("weight") or name.startswith("head.") for name in moved), moved


def test_lora_needs_a_model_to_start_from(tmp_path: Path) -> None:
    row = run_training(config(First, tmp_path, lora={"r": 2}), tmp_path)
    assert row["error"] == "lora belongs to init=, whose weights it leaves as they are, got lora without init"


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        ({"greedy": False, "temperature": 0.5, "top_k": 3}, None),
        ({"beams": 3}, None),
        ({"beams": 2, "top_k": 3}, "decode.beams above 1 takes no decode.top_k: it draws nothing"),
        ({"temperature": 0.5}, "decode.temperature needs decode.greedy=false: the likeliest token is not drawn"),
        ({"beams": 0}, "decode.beams must be an integer of at least 1, got 0"),
    ],
)
def test_evaluation_writes_as_it_is_told(decode: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    given = {**config(Reversal, tmp_path)["decode"], **decode}
    row = run_training(config(Reversal, tmp_path, decode=given), tmp_path)
    assert row["error"] == said
    assert ("exact_match" in row["metrics"]) == (said is None)


def test_what_a_file_says_cannot_be_said_again(tmp_path: Path) -> None:
    for word in ("attention=bigbird", "model.depth=3", "hybrid=[full]"):
        with pytest.raises(ValueError, match=f"{word.partition('=')[0]} is of new models, and init=x brings one"):
            compose_training(["task=marked", "init=x", word])
    assert compose_training(["task=reference", "init=x", "attention=bigbird"])["init"] == "x", "the other half is new"


@pytest.mark.parametrize(
    "change",
    [{"attention": "longformer"}, {"attention": {"name": "full"}}, {"hybrid": ["full"]}, {"model": {"depth": 3}}],
    ids=lambda change: next(iter(change)),
)
def test_what_a_file_says_cannot_be_said_again_in_python(change: dict[str, Any], tmp_path: Path) -> None:
    trained(Odd, tmp_path / "first")
    config_ = config(First, tmp_path, init=str(tmp_path / "first"))
    if "model" in change:
        change = {"model": {**config_["model"], **change["model"]}}
    row = run_training({**config_, **change}, tmp_path / "second")
    assert "is of new models, and init=" in row["error"]
    assert row["refused"]


def test_a_file_of_both_halves_leaves_no_mechanism_to_be_said(tmp_path: Path) -> None:
    trained(Reversal, tmp_path / "first")
    again = {"init": str(tmp_path / "first"), "lora": None}
    trained(Reversal, tmp_path / "second", **again)
    row = run_training({**config(Reversal, tmp_path, **again), "attention": "bigbird"}, tmp_path / "third")
    assert "attention is of new models, and init=" in row["error"]


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(Odd, tmp_path / "first")
    read: list[Path] = []

    def load(path: Path) -> Any:
        read.append(path)
        return zoo.load(path)

    monkeypatch.setattr("attention_zoo.training.tuned.load", load)
    trained(Reversal, tmp_path / "second", init=str(tmp_path / "first"))
    assert read == [tmp_path / "first"]


def test_a_half_that_is_a_stack_is_called_by_its_names() -> None:
    for word, name in (
        ("encoder.attention=[longformer,full]", "longformer+full->full"),
        ("encoder.attention=[longformer,{name: full, scale: 1.0}]", "longformer+full->full"),
        ("decoder.attention={name: bigbird}", "full->bigbird"),
    ):
        assert compose_training(["task=reference", word])["backend"] == name


def test_what_is_no_matter_of_a_halfs_role_is_said_without_it(tmp_path: Path) -> None:
    for words, said in (
        (["encoder.attention=reformer", "encoder.positions=rotary"], "reformer: positions=rotary is not supported"),
        (["encoder.attention=transformer_xl"], "encoder.attention=transformer_xl: this half is not supported"),
    ):
        row = run_training(compose_training(["task=reference", "tracker=none", *words]), tmp_path)
        assert row["error"].startswith(said)
        assert (row["status"], row["refused"]) == ("unsupported", True)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({"name": "longformer", "windw": 3}, "attention.windw is no option of longformer; did you mean window?"),
        ({"name": "longformer", "window": -1}, "attention.window must be an integer of at least 1, got -1"),
        (["full", {"name": "full", "foo": 1}], "attention[1].foo is no option of full"),
        ({"foo": 1}, "attention as a mapping needs a name"),
        ("longfromer", "attention must be one of"),
        (3, "attention must be a name"),
    ],
)
def test_a_wrong_mechanism_of_a_half_is_a_wrong_option(side: str, attention: Any, said: str, tmp_path: Path) -> None:
    given = config(Reversal, tmp_path)
    given[side] = {**given[side], "attention": attention}
    row = run_training(given, tmp_path)
    assert row["error"].startswith(f"{side}.{said}")
    assert (row["status"], row["refused"]) == ("failed", True)


def test_options_without_use_are_refused(tmp_path: Path) -> None:
    row = run_training(config(Next, tmp_path, decode={"beams": 4}), tmp_path)
    assert "decode.beams belongs to tasks whose rows have a source" in row["error"]
    batch = config(First, tmp_path)
    batch["model"]["norm"], batch["trainer"]["accumulate"] = "batch", 4
    assert "trainer.accumulate must be 1 with norm=batch" in run_training(batch, tmp_path)["error"]
    missing = config(First, tmp_path, init=str(tmp_path / "nosuch"))
    assert "init must be a model file, or a folder that holds one" in run_training(missing, tmp_path)["error"]
