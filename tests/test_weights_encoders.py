"""Encoders of transformers, saved and converted: the same logits, with padding on either side, types and globals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pretrained import EXACT, difference, exactly, ragged_mask, saved

from attention_zoo import Tokens
from attention_zoo.integrations import weights

BERT = (hf.BertForMaskedLM, hf.BertConfig)
ROBERTA = (hf.RobertaForMaskedLM, hf.RobertaConfig)
LONGFORMER = (hf.LongformerForMaskedLM, hf.LongformerConfig)
BIGBIRD = (hf.BigBirdForMaskedLM, hf.BigBirdConfig)
CASES: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "bert": (BERT, {}),
    "bert-relu": (BERT, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 3, "num_hidden_layers": 1}),
    "bert-untied": (BERT, {"tie_word_embeddings": False, "pad_token_id": 5}),
    "bert-two-tasks": ((hf.BertForPreTraining, hf.BertConfig), {"hidden_act": "gelu_new"}),
    "roberta": (ROBERTA, {}),
    "roberta-untied": (ROBERTA, {"tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": 2}),
    "xlm-roberta": ((hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig), {"type_vocab_size": 1}),
    "camembert": ((hf.CamembertForMaskedLM, hf.CamembertConfig), {"num_attention_heads": 6}),
    "longformer": (LONGFORMER, {"attention_window": 6}),
    "longformer-windows": (LONGFORMER, {"attention_window": [8, 4, 16]}),
    "bigbird": (BIGBIRD, {"block_size": 2, "num_random_blocks": 2}),
    "bigbird-blocks-of-one": (BIGBIRD, {"block_size": 1, "num_random_blocks": 1, "hidden_act": "relu"}),
    "bigbird-full": (BIGBIRD, {"attention_type": "original_full", "use_bias": False, "rescale_embeddings": True}),
    "bigbird-no-bias": (BIGBIRD, {"block_size": 2, "num_random_blocks": 1, "use_bias": False}),
    "bigbird-two-tasks": ((hf.BigBirdForPreTraining, hf.BigBirdConfig), {"block_size": 3, "num_random_blocks": 1}),
}


def logits_of(model: Any, folder: Path, ids: Any, **call: Any) -> Any:
    if model.config.model_type == "big_bird":  # which stays dense for good once it has met a short batch
        model = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    out = model(ids, **call)
    return out.logits if "logits" in out else out.prediction_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_theirs(case, dtype, tmp_path, monkeypatch) -> None:
    exactly(monkeypatch, dtype)
    (model, config), options = CASES[case]
    theirs = saved(model, config, tmp_path, dtype=dtype, seed=len(case), **options)
    ours = weights.convert(tmp_path)
    for seed, (side, counts) in enumerate([("right", [37, 11, 1]), ("left", [23, 22, 2]), ("right", [5, 5])]):
        ids, mask = ragged_mask(theirs, counts, side=side, seed=seed)
        types = torch.randint(theirs.config.type_vocab_size, ids.shape)
        flags, call = torch.zeros_like(mask), {"attention_mask": mask, "token_type_ids": types}
        if theirs.config.model_type == "longformer":
            flags = (torch.rand(ids.shape) < 0.15).long()
            call["global_attention_mask"] = flags
        expected = logits_of(theirs, tmp_path, ids, **call)
        found = ours(ids, weights.tokens_of(mask, flags), types=types).logits
        assert difference(expected, found, mask) < EXACT[dtype]
        if side == "right" and "block_size" not in options:
            counted = ours(ids, Tokens.of(mask.bool(), flags.bool()), types=types).logits
            assert difference(expected, counted, mask) < EXACT[dtype]
        if bool(mask.all()) and not bool(flags.any()):
            assert difference(expected, ours(ids, types=types).logits, mask) < EXACT[dtype]


@pytest.mark.parametrize("kind", [ROBERTA, LONGFORMER], ids=["roberta", "longformer"])
@torch.no_grad()
def test_padding_ids_among_the_text_take_no_position(kind, tmp_path) -> None:
    theirs = saved(*kind, tmp_path, **({"attention_window": 4} if kind is LONGFORMER else {}))
    ids = torch.randint(4, (3, 19))
    assert (ids == theirs.config.pad_token_id).any()
    ours = weights.convert(tmp_path)
    assert difference(theirs(ids).logits, ours(ids).logits, torch.ones_like(ids)) < 1e-6


@torch.no_grad()
def test_as_long_as_positions_reach_and_no_longer(tmp_path) -> None:
    for kind, length in ((BERT, 40), (ROBERTA, 38)):
        theirs = saved(*kind, tmp_path / str(length))
        ours = weights.convert(tmp_path / str(length))
        ids = torch.randint(3, 31, (1, length))
        assert difference(theirs(ids).logits, ours(ids).logits, torch.ones_like(ids)) < 1e-12
        with pytest.raises(ValueError, match=f"below max_length={length}, got position {length}"):
            ours(torch.randint(3, 31, (1, length + 1)))


@pytest.mark.parametrize("kind", [
    (hf.BertModel, hf.BertConfig), (hf.RobertaModel, hf.RobertaConfig), (hf.LongformerModel, hf.LongformerConfig),
    (hf.BigBirdModel, hf.BigBirdConfig),
], ids=lambda kind: kind[0].__name__)  # fmt: skip
@torch.no_grad()
def test_encoders_without_head_give_the_same_hidden_states(kind, tmp_path, monkeypatch) -> None:
    exactly(monkeypatch, torch.float64)
    options = {"attention_window": 4} if kind[0] is hf.LongformerModel else {}
    theirs = saved(*kind, tmp_path, **options)
    ours = weights.convert(tmp_path)
    assert ours.head_name == "hidden"
    assert all("pooler" in name for name in ours.config["origin"]["left_out"])
    assert len(ours.config["origin"]["left_out"]) == 2
    ids, mask = ragged_mask(theirs, [12, 7])
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    assert difference(expected, ours(ids, weights.tokens_of(mask)).hidden, mask) < 1e-10


@torch.no_grad()
def test_other_heads_are_left_out_only_when_asked(tmp_path) -> None:
    theirs = saved(hf.BertForSequenceClassification, hf.BertConfig, tmp_path)
    with pytest.raises(ValueError, match=r"architectures=.*BertForSequenceClassification.*use head=hidden instead"):
        weights.convert(tmp_path)
    ours = weights.convert(tmp_path, head="hidden")
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= set(ours.config["origin"]["left_out"])
    ids = torch.randint(3, 31, (2, 9))
    expected = theirs.bert(ids).last_hidden_state
    assert difference(expected, ours(ids).hidden, torch.ones_like(ids)) < 1e-12
    with pytest.raises(ValueError, match=r"missing cls\.predictions"):
        weights.convert(tmp_path, head="lm")
