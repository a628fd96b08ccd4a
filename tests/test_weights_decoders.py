"""Decoders of transformers, saved and converted: the same logits, and the same tokens when they write on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from pretrained import EXACT, difference, exactly, ragged_mask, saved

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.integrations import weights

GPT2 = (hf.GPT2LMHeadModel, hf.GPT2Config)
LLAMA = (hf.LlamaForCausalLM, hf.LlamaConfig)
MISTRAL = (hf.MistralForCausalLM, hf.MistralConfig)
QWEN2 = (hf.Qwen2ForCausalLM, hf.Qwen2Config)


def rope(kind: str = "default", **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0, **options}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "gpt2": (GPT2, {"n_head": 4}),
    "gpt2-untied": (GPT2, {"tie_word_embeddings": False, "n_inner": 17, "activation_function": "relu"}),
    "gpt2-scaled-by-layer": (GPT2, {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-2}),
    "gpt2-unscaled": (GPT2, {"scale_attn_weights": False, "n_layer": 1, "reorder_and_upcast_attn": True}),
    "llama": (LLAMA, {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama-wide-heads": (LLAMA, {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True, **rope()}),
    "llama-narrow-heads": (LLAMA, {"num_key_value_heads": 1, "head_dim": 2}),
    "llama-linear": (LLAMA, {"num_key_value_heads": 3, **rope("linear", factor=4.0)}),
    "llama3": (LLAMA, {"num_key_value_heads": 1, "head_dim": 16, **LLAMA3}),
    "mistral-window": (MISTRAL, {"num_key_value_heads": 1, "sliding_window": 5}),
    "mistral-full": (MISTRAL, {"num_key_value_heads": 3, "sliding_window": None}),
    "qwen2": (QWEN2, {"num_key_value_heads": 1}),
    "qwen2-mixed": (QWEN2, {
        "num_key_value_heads": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_written_tokens_are_theirs(case, dtype, tmp_path, monkeypatch) -> None:
    kind, options = CASES[case]
    theirs = saved(*kind, tmp_path / "theirs", dtype=dtype, seed=len(case), **options)
    exactly(monkeypatch, dtype, theirs)
    ours = weights.convert(tmp_path / "theirs")
    for seed, (side, counts) in enumerate([("right", [37, 11, 1]), ("left", [23, 22, 2]), ("right", [5, 5])]):
        ids, mask = ragged_mask(theirs, counts, side=side, seed=seed)
        expected = theirs(ids, attention_mask=mask).logits
        assert difference(expected, ours(ids, weights.tokens_of(mask)).logits, mask) < EXACT[dtype]
        if side == "right":
            assert difference(expected, ours(ids, Tokens.of(mask.bool())).logits, mask) < EXACT[dtype]
        if bool(mask.all()):
            assert difference(expected, ours(ids).logits, mask) < EXACT[dtype]
    ours = zoo.load(zoo.save(ours, tmp_path / "ours"))
    if dtype == torch.float32:
        return  # what is written follows from the logits
    ids, mask = ragged_mask(theirs, [9, 4, 1], side="left", seed=9)
    written = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 9:]
    for cached in (True, False):
        found = zoo.generate(ours, ids, valid=mask.bool(), steps=20, greedy=True, cached=cached)
        assert torch.equal(found, written)


@pytest.mark.parametrize("kind", [
    (hf.GPT2Model, hf.GPT2Config), (hf.LlamaModel, hf.LlamaConfig), (hf.Qwen2Model, hf.Qwen2Config),
], ids=lambda kind: kind[0].__name__)  # fmt: skip
@torch.no_grad()
def test_decoders_without_head_give_the_same_hidden_states(kind, tmp_path, monkeypatch) -> None:
    theirs = saved(*kind, tmp_path, **({} if kind[0] is hf.GPT2Model else {"num_key_value_heads": 1}))
    exactly(monkeypatch, torch.float64, theirs)
    ours = weights.convert(tmp_path)
    ids, mask = ragged_mask(theirs, [12, 7])
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    assert difference(expected, ours(ids, weights.tokens_of(mask)).hidden, mask) < 1e-10


@torch.no_grad()
def test_far_positions_turn_by_the_same_angle(tmp_path) -> None:
    """Rounding of a frequency grows with the position: at 3,000 tokens it shows in float32, unless it is theirs."""
    for options in ({}, LLAMA3):
        theirs = saved(
            *LLAMA, tmp_path, dtype=torch.float32, max_position_embeddings=4096, num_hidden_layers=1, **options
        )
        ours = weights.convert(tmp_path)
        ids = torch.randint(3, 31, (1, 3001))
        assert difference(theirs(ids).logits, ours(ids).logits, torch.ones_like(ids)) < 1e-5
