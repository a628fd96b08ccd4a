"""Nothing is built that the task cannot use: after a few steps every weight has had a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import attention_zoo as zoo
from attention_zoo.jobs.compare import CompareConfig, TrainingPlan
from attention_zoo.model.transformer import Transformer
from attention_zoo.training.assembly import assemble
from attention_zoo.training.building import build
from attention_zoo.training.config import check, compose_training, options_of
from attention_zoo.training.models import mechanism_of

EVERYONE = (*zoo.available(), *zoo.wrappers())
SMALL: Any = OmegaConf.to_container(
    OmegaConf.load(Path(__file__).parent.parent / "conf" / "compare.yaml")["small"]  # type: ignore[index]
)
SIZES: dict[str, Any] = {"vocab": 16, "dim": 16, "depth": 2, "heads": 2}


def dead(config: dict[str, Any], steps: int = 3) -> list[str]:
    """Names of the parameters that no step gave a gradient."""
    options = options_of(check(config))
    parts = assemble(options, mechanism_of(options), build(options.task, "task"))
    left = dict(parts.model.named_parameters())
    for _ in range(steps):
        parts.trainer.step()
        left = {name: p for name, p in left.items() if p.grad is None or not bool(p.grad.any())}
    return list(left)


@pytest.mark.parametrize("name", EVERYONE)
def test_every_weight_of_every_backend_learns_on_recall(name: str) -> None:
    given = {"task": {"pairs": 2}, "batch": 4, "device": "cpu", "threads": 1, "model": {"dim": 16}}
    plan = TrainingPlan("mqar", set=given, options={name: SMALL.get(name, {})})
    (run,) = CompareConfig(backends=[name], trainings={"recall": plan}).runs()
    assert dead(run.config) == []


def test_such_a_weight_is_found() -> None:
    """Global projections, where somebody asks for them and no token is global."""
    words = ["attention=longformer", "task=mqar", "tracker=none", "model.dim=16", "batch=4", "device=cpu"]
    assert dead(compose_training(words), steps=1) == []
    found = dead(compose_training([*words, "attention.global_projections=separate"]), steps=1)
    assert len(found) == 12
    assert all("_global." in name for name in found)


@pytest.mark.parametrize("asked", [False, True])
def test_the_task_says_whether_it_has_global_tokens(asked: bool) -> None:
    words = ["attention=longformer", "task=quote", "tracker=none", "model.dim=16", "batch=4", "device=cpu"]
    config = compose_training([*words, f"task.global_quote={str(asked).lower()}"])
    options = options_of(check(config))
    parts = assemble(options, mechanism_of(options), build(options.task, "task"))
    assert any("_global" in name for name, _ in parts.model.named_parameters()) == asked


def test_a_task_that_says_none_must_bring_none() -> None:
    words = ["attention=longformer", "task=quote", "tracker=none", "model.dim=16", "batch=4", "device=cpu"]
    options = options_of(check(compose_training([*words, "task.global_quote=true"])))
    task = build(options.task, "task")
    task.global_tokens = False
    trainer = assemble(options, mechanism_of(options), task).trainer
    with pytest.raises(ValueError, match=r"Quote\.global_tokens must be true where some tokens are global, got False"):
        trainer.step()


@pytest.mark.parametrize(
    ("attention", "separate"),
    [
        ("longformer", False),
        ({"name": "longformer", "global_projections": "separate"}, True),
        ({"name": "global_tokens", "inner": "longformer"}, True),
        ([{"name": "bigbird", "extra_global_tokens": 2}, "longformer"], True),
        ({"name": "memory_tokens", "inner": "longformer"}, False),
    ],
)
def test_global_projections_are_there_where_tokens_are_global(attention: Any, separate: bool) -> None:
    model = Transformer(attention=attention, global_tokens=False, **SIZES)
    assert any("_global." in name for name, _ in model.named_parameters()) == separate
    assert any("_global." in name for name, _ in Transformer(attention="longformer", **SIZES).named_parameters())


def test_older_weights_load_and_what_is_left_out_is_said() -> None:
    old = Transformer(attention="longformer", **SIZES)
    new = Transformer(attention="longformer", global_tokens=False, **SIZES)
    with pytest.warns(UserWarning, match="to_q_global, to_k_global and to_v_global are left out"):
        new.load_state_dict(old.state_dict())
    ids = torch.arange(12)[None]
    assert torch.equal(new.eval()(ids).logits, old.eval()(ids).logits)
    asked = Transformer(attention={"name": "longformer", "global_projections": "shared"}, **SIZES)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        asked.load_state_dict(old.state_dict())


@pytest.mark.parametrize("global_tokens", [False, True])
def test_both_kinds_of_model_are_saved_and_loaded(global_tokens: bool, tmp_path: Path) -> None:
    model = Transformer(attention="longformer", global_tokens=global_tokens, **SIZES)
    zoo.save(model, tmp_path / "model.safetensors")
    again = zoo.load(tmp_path / "model.safetensors")
    assert again.parameter_count == model.parameter_count


def test_a_model_file_from_before_says_nothing_of_global_tokens_and_has_its_weights() -> None:
    config = dict(Transformer(attention="longformer", **SIZES).config)
    del config["global_tokens"]
    config["attention"] = [{"name": "longformer", "global_projections": "separate"}]
    assert any("_global." in name for name, _ in Transformer(**config).named_parameters())
