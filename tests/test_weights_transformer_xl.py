"""Checkpoints of Transformer-XL against what transformers 4.35.2 computed with them: logits, memories, gradients, text.

The numbers in oracles/transfo_xl/models were written there by dump.py (see build.sh). With ATTENTION_ZOO_TRANSFO_XL
naming an environment that build.sh made, other random models are dumped and compared on the spot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracles.transformer_xl_recorded import LANGUAGE, MODELS, converted, errors, run
from safetensors.torch import load_file
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Transformer
from attention_zoo.integrations import weights

HERE = Path(__file__).parent / "oracles" / "transfo_xl"


def check(folder: Path) -> None:
    numbers, config = load_file(folder / "numbers.safetensors"), json.loads((folder / "config.json").read_text())
    ids, cuts = numbers["ids"], numbers["cuts"].tolist()
    for kind in ("zeros", "empty"):
        for dtype, bound in LANGUAGE.errors.items():
            for at_once in (False, True):
                found = errors(folder, kind, dtype, at_once=at_once)
                assert found.output <= bound.output
                assert found.gradient <= bound.gradient, f"in the gradient of {found.worst}"
        model = converted(folder, torch.float64, empty=kind == "empty", segment=cuts[0])
        for layer, memory in enumerate(() if config["pre_lnorm"] else run(model, ids, cuts)[1]):
            theirs = numbers[f"{kind}.mems.{layer}"]
            both = min(memory.shape[1], theirs.shape[1])
            assert both >= min(config["mem_len"] - 1, ids.shape[1])
            pairs = memory[:, memory.shape[1] - both :], theirs[:, theirs.shape[1] - both :]
            assert torch.allclose(*pairs, rtol=0, atol=1e-10)
    model = converted(folder, torch.float32, segment=ids.shape[1])
    if config["same_length"]:
        written = zoo.generate(model, ids, steps=6, greedy=True)
    else:  # each token that is fed back is a call there, and so a segment
        written = write_in_segments_of_one(model, ids, 6)
    assert torch.equal(written, numbers["written"])


@torch.no_grad()
def write_in_segments_of_one(model: Transformer, ids: Tensor, steps: int) -> Tensor:
    out = model(ids, state=model.initial_state(len(ids)))
    for layer in model.stack.attentions:
        layer.segment_length = 1
    written = [out.logits[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        out = model(written[-1][:, None], state=out.state)
        written.append(out.logits[:, -1].argmax(-1))
    return torch.stack(written, 1)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_equals_what_transformers_computed(folder: Path) -> None:
    check(folder)


def test_the_numbers_cover_what_configs_can_say() -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in MODELS]
    for key, values in {
        "same_length": (True, False), "untie_r": (True, False), "pre_lnorm": (True, False), "div_val": (1, 2),
    }.items():  # fmt: skip
        assert {config[key] for config in configs} >= set(values), key
    assert any(not config["cutoffs"] for config in configs)
    assert any(config.get("tie_word_embeddings") is False for config in configs)
    assert any(config["d_embed"] != config["d_model"] and config["div_val"] == 1 for config in configs)
    assert any(config["clamp_len"] > 0 for config in configs)
    assert any(any(config["tie_projs"]) and config["div_val"] > 1 for config in configs)
    assert any((folder / "pytorch_model.bin").exists() for folder in MODELS)
    assert sum(file.stat().st_size for folder in MODELS for file in folder.iterdir()) < 2**20


def test_equals_transformers_itself(tmp_path: Path) -> None:
    environment = os.environ.get("ATTENTION_ZOO_TRANSFO_XL")
    if environment is None:
        pytest.skip("ATTENTION_ZOO_TRANSFO_XL names no environment; tests/oracles/transfo_xl/build.sh makes one")
    seeds = [str(seed) for seed in range(100, 112)]
    call = [Path(environment) / "bin" / "python", HERE / "dump.py", tmp_path, *seeds]
    subprocess.run(call, check=True, capture_output=True)
    for folder in sorted(tmp_path.iterdir()):
        check(folder)


def changed(folder: Path, to: Path, **settings: object) -> Path:
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return to


@pytest.mark.parametrize(("settings", "message"), [
    ({"attn_type": 1}, "attn_type=1 is not supported"),
    ({"sample_softmax": 5}, "sample_softmax=5 is not supported"),
    ({"adaptive": False}, "adaptive=False is not supported"),
    ({"mem_len": 0, "same_length": True}, "mem_len=0 is not supported"),
    ({"ext_len": 3}, "ext_len"),
])  # fmt: skip
def test_what_is_not_converted_is_refused_by_name(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights.convert(changed(MODELS[0], tmp_path / "model", **settings))


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    layers = json.loads((MODELS[0] / "config.json").read_text())["n_layer"]
    with pytest.raises(
        ValueError, match=rf"missing transformer.layers.{layers}.dec_attn.layer_norm.bias, .*unknown nothing"
    ):
        weights.convert(changed(MODELS[0], tmp_path / "deeper", n_layer=layers + 1))
    with pytest.raises(ValueError, match=rf"missing nothing; unknown transformer.layers.{layers - 1}.*"):
        weights.convert(changed(MODELS[0], tmp_path / "flatter", n_layer=layers - 1))


def test_saves_and_loads(tmp_path: Path) -> None:
    for folder in MODELS[:3]:
        ours = weights.convert(folder)
        again = zoo.load(zoo.save(ours, tmp_path / f"{folder.name}.safetensors"))
        ids = torch.randint(ours.vocab, (2, 9))
        with torch.no_grad():
            logits = ours(ids).logits
            assert torch.equal(logits, again(ids).logits)
        assert torch.allclose(logits.exp().sum(-1), torch.ones(2, 9), atol=1e-5)


def test_a_row_that_begins_with_zeros_is_one_document() -> None:
    layer = zoo.build("transformer_xl", dim=8, heads=2, segment_length=4, memory_length=3, initial_memory="zeros")
    document = torch.tensor([[0, 0, 1, 1, 1]])
    tokens = zoo.Tokens.of(torch.ones(1, 5, dtype=torch.bool), document=document)
    with pytest.raises(zoo.Unsupported, match="several documents in a row"):
        layer(torch.randn(1, 5, 8), tokens)
