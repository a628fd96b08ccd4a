"""A converted checkpoint is tuned on tasks of each objective that its direction allows, whole or with adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretrained import saved

import attention_zoo as zoo
from attention_zoo.integrations import weights
from attention_zoo.model.heads import Pretraining
from attention_zoo.tasks.task import Task
from attention_zoo.training.building import build
from attention_zoo.training.config import check, compose_training, options_of
from attention_zoo.training.models import model_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.run import run_training

BERT = {"vocab_size": 300, "max_position_embeddings": 300, "hidden_size": 16, "num_attention_heads": 2}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # else a warning
GPT2 = {"vocab_size": 100, "n_positions": 300, "n_embd": 16, "n_head": 2}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
QUICK = ["tracker=none", "trainer.progress=none", "threads=1", "steps=2", "batch=4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, cls, config, sizes in (
        ("bert", transformers.BertForMaskedLM, transformers.BertConfig, BERT),
        ("gpt2", transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    ):  # fmt: skip
        place = tmp_path_factory.mktemp(name)
        saved(cls, config, place / "theirs", dtype=torch.float32, **sizes)
        zoo.save(weights.convert(place / "theirs"), place / "ours" / "model.safetensors")
        found[name] = place / "ours"
    return found


def tuned(task: str, init: Path, folder: Path, *words: str) -> dict[str, Any]:
    config = compose_training([f"task={task}", f"init={init}", *QUICK, *words])
    for option in ("test_examples", "evaluation_rows"):
        if option in config["task"]:
            config["task"][option] = 4
    if "max_bytes" in config["task"]:
        config["task"] |= {"max_bytes": 200_000, "held_out_bytes": 40_000}
    return dict(run_training(config, folder))


TASKS = {
    "bert": ("mlm", "quote", "brackets", "marked", "reference"),
    "gpt2": ("mqar", "quote", "brackets", "reference", "flip_flop"),
}
ADAPTED = (("bert", "mlm"), ("bert", "brackets"), ("bert", "marked"), ("gpt2", "mqar"), ("gpt2", "reference"))
"""One of each objective, and each direction."""


@pytest.mark.parametrize(
    ("name", "task", "lora"),
    [pytest.param(name, task, (), id=f"{name}-{task}-whole") for name in TASKS for task in TASKS[name]]
    + [pytest.param(*each, ("lora={r: 2}",), id="-".join((*each, "lora"))) for each in ADAPTED],
)
def test_a_checkpoint_is_tuned_on_tasks_of_every_objective_that_it_can(
    name: str, task: str, lora: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ["seq_len=192"] if task in ("mlm", "quote") else []
    row = tuned(task, folders[name], tmp_path, *words, *lora)
    assert row["status"] == "ok", row["error"]
    assert isinstance(zoo.load(tmp_path), zoo.EncoderDecoder if task == "reference" else zoo.Transformer)


@pytest.mark.parametrize(("name", "task"), [("bert", "mqar"), ("gpt2", "mlm")])
def test_a_checkpoint_that_looks_the_other_way_is_refused(
    name: str, task: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    row = tuned(task, folders[name], tmp_path)
    assert row["status"] == "failed"
    assert f"init={folders[name]} holds a model that" in row["error"]


def test_a_pretraining_head_keeps_the_checkpoints_own(folders: dict[str, Path]) -> None:
    options = options_of(check(compose_training(["task=mlm", f"init={folders['bert']}", *QUICK])))
    task: Task = build(options.task, "task")
    model: Any = model_of(options, None, task, objective_of(task))
    old: Any = zoo.load(folders["bert"])
    ids = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        found, before = model.eval()(ids), old(ids)
    assert isinstance(model.head, Pretraining)
    assert torch.equal(found.logits.tokens[..., : old.vocab], before.logits)
    assert found.logits.row.shape == (2, 2)
    assert torch.equal(found.hidden, before.hidden)
