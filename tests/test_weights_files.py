"""Checkpoints as files: every form that transformers writes, and one clear line for whatever is wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pretrained import saved
from safetensors.torch import load_file, save_file

import attention_zoo as zoo
from attention_zoo import Unsupported
from attention_zoo.integrations import weights
from attention_zoo.integrations.weights.families import FAMILIES
from attention_zoo.integrations.weights.settings import Settings


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    return saved(hf.BertForMaskedLM, hf.BertConfig, tmp_path)


def same(model: Any, theirs: Any) -> bool:
    ids = torch.randint(3, 31, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(ids).logits - theirs(ids).logits).abs().max()) < 1e-12


def as_bin(folder: Path, theirs: Any) -> None:
    """What older versions of transformers wrote: all names of the state, tied ones too, and buffers."""
    tensors = {**theirs.state_dict(), "bert.embeddings.position_ids": torch.arange(40)[None]}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def rewritten(folder: Path, **changes: Any) -> None:
    """Other values in config.json; `...` takes a key away."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- what can be read ------------------------------------------------------------------------------------------------


def test_pytorch_files_are_read_as_tensors_alone(bert, tmp_path) -> None:
    as_bin(tmp_path, bert)
    model = weights.convert(tmp_path)
    assert same(model, bert)
    assert model.config["origin"]["left_out"] == [
        "bert.embeddings.position_ids", "cls.predictions.bias", "cls.predictions.decoder.weight",
    ]  # fmt: skip


def test_shards_are_read(bert, tmp_path) -> None:
    whole = weights.convert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    bert.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(weights.convert(tmp_path), bert)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for path in tmp_path.glob("model-*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {name: file.replace(".safetensors", ".bin") for name, file in index.items()}})
    )
    model = weights.convert(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))


def test_safetensors_come_first(bert, tmp_path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert same(weights.convert(tmp_path), bert)


def test_norms_under_their_first_names(bert, tmp_path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors")
    assert same(weights.convert(tmp_path), bert)


def test_a_config_that_ties_is_believed_unless_the_matrices_differ(bert, tmp_path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    table = "bert.embeddings.word_embeddings.weight"
    for other, tied in ((tensors[table].clone(), True), (tensors[table] + 1, False)):
        save_file({**tensors, "cls.predictions.decoder.weight": other}, tmp_path / "model.safetensors")
        model = weights.convert(tmp_path)
        assert (model.head.weight is model.embedding.weight) == tied
        theirs = hf.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert same(model, theirs.eval())
    named_by_head = {**tensors, "cls.predictions.decoder.weight": tensors.pop(table)}
    del named_by_head[table]
    save_file(named_by_head, tmp_path / "model.safetensors")
    assert same(weights.convert(tmp_path), bert)


def test_dtype_is_the_checkpoints_or_the_callers(tmp_path) -> None:
    saved(hf.GPT2LMHeadModel, hf.GPT2Config, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in weights.convert(tmp_path).parameters()} == {torch.bfloat16}
    model = weights.convert(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    before = torch.get_rng_state()
    weights.convert(tmp_path)
    assert torch.equal(before, torch.get_rng_state()), "converting draws nothing"


def test_a_converted_model_needs_neither_transformers_nor_hydra(bert, tmp_path) -> None:
    path = zoo.save(weights.convert(tmp_path), tmp_path / "ours.safetensors")
    code = (
        "import sys, attention_zoo as zoo\n"
        f"model = zoo.load({str(path)!r})\n"
        "assert model.config['origin']['model_type'] == 'bert'\n"
        "assert not {'transformers', 'hydra', 'attention_zoo.integrations'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- training --------------------------------------------------------------------------------------------------------


def test_training_says_that_dropout_acts_on_outputs(bert, tmp_path) -> None:
    model = weights.convert(tmp_path)
    model.eval()
    again = zoo.load(zoo.save(model, tmp_path / "ours.safetensors"))
    for one in (model, again):
        with pytest.warns(
            UserWarning, match=r"trained with dropout 0.1 inside attention.*output_dropout=0.1"
        ) as caught:
            one.train().train()
        assert len(caught) == 1
    assert model.embedding.dropout.p == 0.1
    rewritten(tmp_path, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    weights.convert(tmp_path).train()  # warnings are errors here


# --- what is wrong with files ----------------------------------------------------------------------------------------


def test_missing_files_are_named(bert, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all: no such folder, and not the name of a model"):
        weights.convert("nowhere/at/all")
    with pytest.raises(FileNotFoundError, match=r"\./nowhere: no such folder"):
        weights.convert("./nowhere")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        weights.convert(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        weights.convert(tmp_path)


def test_no_network_is_one_line(monkeypatch, tmp_path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"some/model: no such folder, and the hub cannot be reached") as caught:
        weights.convert("some/model")
    one_line(caught.value)


def test_attempts_to_reach_the_hub_are_not_told_one_by_one(monkeypatch, capfd) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    def tried(*_: Any, **__: Any) -> str:
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", tried)
    before = logging.get_verbosity()
    with pytest.raises(
        FileNotFoundError, match=r"^nope: no such folder, and the hub cannot be reached for config.json"
    ):
        weights.convert("nope")
    assert capfd.readouterr().err == ""
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("damage", [b"", b"hello", b"\xff" * 200, None], ids=["empty", "text", "bytes", "cut"])
def test_damaged_files_are_refused_in_one_line(bert, tmp_path, damage) -> None:
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(ValueError, match="not readable as safetensors") as caught:
        weights.convert(tmp_path)
    one_line(caught.value)
    path.write_bytes(whole)
    as_bin(tmp_path, bert)
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: not readable") as caught:
        weights.convert(tmp_path)
    one_line(caught.value)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("/").joinpath, ("bomb",))


def test_pickles_are_not_executed(bert, tmp_path) -> None:
    (tmp_path / "model.safetensors").unlink()
    for content, message in (
        ({"weight": Bomb()}, "holds more than tensors, and is not trusted"),
        ({"weight": 3}, "must hold a table of tensors by name"),
        ([torch.zeros(1)], "must hold a table of tensors by name"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message) as caught:
            weights.convert(tmp_path)
        one_line(caught.value)


def test_broken_indexes_are_named(bert, tmp_path) -> None:
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    name = "bert.embeddings.LayerNorm.weight"
    for table, error, message in (
        ({}, ValueError, "has no weight_map"),
        ({"weight_map": {name: "b.safetensors"}}, FileNotFoundError, "the shard b.safetensors is missing"),
        ({"weight_map": {name: "../a.safetensors"}}, ValueError, r"must lie in a file beside the index, got '\.\./a"),
        ({"weight_map": {"odd": "a.safetensors"}}, ValueError, "a.safetensors: lacks odd"),
    ):
        index.write_text(json.dumps(table))
        with pytest.raises(error, match=message) as caught:
            weights.convert(tmp_path)
        one_line(caught.value)
    index.write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        weights.convert(tmp_path)


def test_broken_configs_are_named(bert, tmp_path) -> None:
    for text, message in (("{", "not readable as JSON"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            weights.convert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        Unsupported, match="model_type='None' is not supported: this family is not converted; use bert or"
    ):
        weights.convert(tmp_path)


def test_keys_that_are_missing_or_unknown_are_listed(bert, tmp_path) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    path, key = tmp_path / "model.safetensors", "bert.encoder.layer.1.attention.self.key.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(ValueError, match=f"missing {key}; unknown nothing"):
        weights.convert(tmp_path)
    save_file({**tensors, "bert.odd": torch.zeros(1), "z.odd": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing nothing; unknown bert.odd, z.odd$"):
        weights.convert(tmp_path)
    save_file(tensors, path)
    rewritten(tmp_path, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"missing bert.encoder.layer.3.*; unknown nothing"):
        weights.convert(tmp_path)
    rewritten(tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"missing nothing; unknown bert.encoder.layer.2.*"):
        weights.convert(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vocab_size": 30}, r"word_embeddings.weight \(31, 24\) does not fit the config, which needs \(30, 24\)"),
    ({"intermediate_size": 21}, r"intermediate.dense.weight \(20, 24\) does not fit the config, which needs \(21"),
    ({"max_position_embeddings": 41}, r"position_embeddings.weight \(40, 24\) does not fit"),
    ({"num_attention_heads": 5}, "its config builds no model: heads must divide dim, got heads=5 for dim=24"),
    ({"hidden_size": "wide"}, "hidden_size must be a number, got 'wide'"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named(bert, tmp_path, changes, message) -> None:
    rewritten(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        weights.convert(tmp_path)
    one_line(caught.value)


def test_a_gpt2_of_another_width_does_not_fit(tmp_path) -> None:
    saved(hf.GPT2LMHeadModel, hf.GPT2Config, tmp_path)
    rewritten(tmp_path, n_embd=48)
    with pytest.raises(ValueError, match="does not fit the config") as caught:
        weights.convert(tmp_path)
    one_line(caught.value)


# --- settings --------------------------------------------------------------------------------------------------------

TINY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {}),
    "longformer": (hf.LongformerForMaskedLM, hf.LongformerConfig, {"attention_window": 4}),
    "big_bird": (hf.BigBirdForMaskedLM, hf.BigBirdConfig, {"block_size": 2}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {"num_key_value_heads": 3}),
}


@pytest.mark.parametrize(("family", "changes"), [
    ("bert", {"position_embedding_type": "relative_key"}),
    ("bert", {"hidden_act": "tanh"}),
    ("bert", {"is_decoder": True}),
    ("bert", {"embedding_size": 8}),
    ("bert", {"quantization_config": {"bits": 4}}),
    ("longformer", {"attention_window": [4, 4]}),
    ("longformer", {"attention_window": 5}),
    ("longformer", {"attention_dilation": [1, 2, 2]}),
    ("longformer", {"autoregressive": True}),
    ("big_bird", {"attention_type": "sliding"}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"activation_function": "tanh"}),
    ("gpt2", {"logit_scale": 0.5}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"sliding_window": 8}),
    ("llama", {"attention_multiplier": 0.2}),
    ("llama", {"final_logit_softcapping": 30.0}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}),
    ("llama", {"pretraining_tp": 2}),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
], ids=str)  # fmt: skip
def test_settings_that_are_not_honoured_are_refused_by_name(family, changes, tmp_path) -> None:
    cls, config, options = TINY[family]
    saved(cls, config, tmp_path, **options)
    weights.convert(tmp_path)
    rewritten(tmp_path, **changes)
    with pytest.raises(Unsupported, match=next(iter(changes)).replace("rope_scaling", "rope_type")) as caught:
        weights.convert(tmp_path)
    assert family in one_line(caught.value)


def test_a_setting_that_changes_nothing_may_be_ignored_by_name(bert, tmp_path) -> None:
    rewritten(tmp_path, colour="blue", shape=None)
    with pytest.raises(
        Unsupported, match=r"colour='blue' is not supported: the conversion does not know .*use ignore="
    ):
        weights.convert(tmp_path)
    assert same(weights.convert(tmp_path, ignore=["colour"]), bert)


def test_old_ways_to_write_rotary_settings(tmp_path) -> None:
    theirs = saved(
        hf.LlamaForCausalLM, hf.LlamaConfig, tmp_path, dtype=torch.float32,
        rope_parameters={"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0},
    )  # fmt: skip
    rewritten(tmp_path, rope_parameters=..., rope_theta=700.0, rope_scaling={"type": "linear", "factor": 3.0})
    ids = torch.randint(3, 31, (2, 30))
    assert (theirs(ids).logits - weights.convert(tmp_path)(ids).logits).abs().max() < 1e-5


COMMON = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "transformers_version": "4.30.0"}
ENCODER = {
    **COMMON, "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 2, "vocab_size": 30522,
    "position_embedding_type": "absolute", "use_cache": True,
}  # fmt: skip
DECODER = {
    **COMMON, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert": {**ENCODER, "max_position_embeddings": 512, "directionality": "bidi", "pooler_fc_size": 768,
             "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
             "pooler_type": "first_token_transform", "classifier_dropout": None},
    "roberta": {**ENCODER, "max_position_embeddings": 514},
    "xlm-roberta": {**ENCODER, "max_position_embeddings": 514, "output_past": True},
    "longformer": {**ENCODER, "max_position_embeddings": 4098, "attention_mode": "longformer", "sep_token_id": 2,
                   "attention_window": [512] * 12, "ignore_attention_mask": False},
    "big_bird": {**ENCODER, "max_position_embeddings": 4096, "attention_type": "block_sparse", "block_size": 64,
                 "num_random_blocks": 3, "rescale_embeddings": False, "use_bias": True, "sep_token_id": 66},
    "gpt2": {**COMMON, "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "n_ctx": 1024,
             "layer_norm_epsilon": 1e-5, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
             "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "vocab_size": 50257,
             "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "_num_labels": 1,
             "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    "llama": {**DECODER, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1,
              "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                               "original_max_position_embeddings": 8192}},
    "mistral": {**DECODER, "sliding_window": None, "attention_dropout": 0.0, "head_dim": 128},
    "qwen2": {**DECODER, "sliding_window": 131072, "max_window_layers": 28, "use_sliding_window": False,
              "use_mrope": False, "attention_dropout": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_configs_as_they_are_published_are_understood(family) -> None:
    settings = Settings({"model_type": family, **PUBLISHED[family]}, "hub")
    plan = FAMILIES[family].plan(settings, {}, "lm")
    settings.finish()
    assert len(plan.options["attention"]) == 1 or plan.options["attention"] == "full" or family == "longformer"
