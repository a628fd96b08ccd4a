"""Reformers of transformers, saved and converted: the same logits with nothing replayed, and the same text."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pretrained import EXACT, difference, ragged_mask, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Unsupported
from attention_zoo.integrations import weights
from attention_zoo.testing import contract_checks

SHAPE = {
    "vocab_size": 31, "hidden_size": 12, "num_attention_heads": 3, "attention_head_size": 4, "feed_forward_size": 20,
    "axial_pos_shape": [6, 8], "axial_pos_embds_dim": [5, 7], "max_position_embeddings": 48, "hash_seed": 3,
    "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "attn_layers": ["local", "lsh"],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as released": {"attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"]},
    "lsh alone": {"attn_layers": ["lsh", "lsh"], "num_buckets": 4},
    "local alone": {"attn_layers": ["local"], "local_num_chunks_before": 2},
    "other chunks": {"lsh_attn_chunk_length": 6, "local_attn_chunk_length": 4},
    "many rounds": {"num_hashes": 3, "num_buckets": [2, 4], "lsh_num_chunks_before": 2},
    "no neighbours": {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0, "hidden_act": "gelu"},
    "learned positions": {"axial_pos_embds": False, "layer_norm_eps": 1e-3},
    "longer than the ring": {"lsh_num_chunks_before": 4, "local_num_chunks_before": 5, "axial_pos_shape": [8, 6]},
    "chunked": {"chunk_size_feed_forward": 1, "chunk_size_lm_head": 1, "num_buckets": 2},
}
BOTH_WAYS = {"lsh_num_chunks_after": 1, "local_num_chunks_after": 2}


def saved(folder: Path, causal: bool, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    config = hf.ReformerConfig(**{**SHAPE, "is_decoder": causal, **options})
    cls = hf.ReformerModelWithLMHead if causal else hf.ReformerForMaskedLM
    model = random_model(cls, config, seed=len(options), dtype=dtype)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Of a model that has not been called: theirs keeps the bucket count of its first call."""
    return deepcopy(model)(ids, attention_mask=mask).logits


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_theirs(case: str, causal: bool, tmp_path: Path) -> None:
    options = CASES[case] if causal else {**BOTH_WAYS, **CASES[case]}
    theirs = saved(tmp_path, causal, **options)
    ours = weights.convert(tmp_path)
    for seed, (side, counts) in enumerate([
        ("right", [45, 11, 1]), ("left", [23, 22, 2]), ("right", [24, 24]), ("right", [3, 2]), ("right", [9, 7]),
    ]):  # fmt: skip
        ids, mask = ragged_mask(theirs, counts, side=side, seed=seed)
        expected = logits_of(theirs, ids, mask)
        assert difference(expected, ours(ids, weights.tokens_of(mask)).logits, mask) < EXACT[torch.float64]
        if bool(mask.all()):
            assert difference(expected, ours(ids).logits, mask) < EXACT[torch.float64]
            assert difference(logits_of(theirs, ids, None), ours(ids).logits, mask) < EXACT[torch.float64]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
@torch.no_grad()
def test_logits_are_theirs_in_float32(causal: bool, tmp_path: Path) -> None:
    """One round: of several, theirs weighs a token that sees only itself by the last place of -1e5, which is 0.008."""
    theirs = saved(tmp_path, causal, torch.float32, num_hashes=1)
    ours = weights.convert(tmp_path)
    assert ours.embedding.weight.dtype == torch.float32
    ids, mask = ragged_mask(theirs, [37, 20])
    expected = logits_of(theirs, ids, mask)
    assert difference(expected, ours(ids, weights.tokens_of(mask)).logits, mask) < EXACT[torch.float32]


@torch.no_grad()
def test_float32_of_several_rounds_is_near_their_float64(tmp_path: Path) -> None:
    theirs = saved(tmp_path, False, torch.float32, num_hashes=4, attn_layers=["local"] * 3)
    ours = weights.convert(tmp_path)
    ids, mask = ragged_mask(theirs, [37, 20])
    expected = logits_of(theirs.double(), ids, mask)
    assert difference(expected, ours(ids, weights.tokens_of(mask)).logits, mask) < EXACT[torch.float32]


@pytest.mark.parametrize("rounds", [1, 3])
def test_writes_the_same_text(rounds: int, tmp_path: Path) -> None:
    theirs = saved(tmp_path, True, num_hashes=rounds, num_buckets=4, eos_token_id=None)
    ours = weights.convert(tmp_path)
    for length in (2, 7, 16):
        ids = torch.randint(3, 31, (2, length), generator=torch.Generator().manual_seed(length))
        written = theirs.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
        assert torch.equal(zoo.generate(ours, ids, steps=12, greedy=True, cached=False), written[:, length:])


@torch.no_grad()
def test_hidden_states_without_a_head(tmp_path: Path) -> None:
    theirs = random_model(hf.ReformerModel, hf.ReformerConfig(**SHAPE))
    theirs.save_pretrained(tmp_path)
    ours = weights.convert(tmp_path)
    ids = torch.randint(3, 31, (2, 21))
    hidden = ours(ids).hidden
    assert hidden.shape == (2, 21, 24)
    assert difference(theirs(ids).last_hidden_state, hidden, torch.ones_like(ids)) < 1e-10
    masked = saved(tmp_path / "masked", False)
    assert weights.convert(tmp_path / "masked", head="hidden").head_name == "hidden"
    assert masked.lm_head.bias.abs().max() > 0


@pytest.mark.parametrize(("version", "saved_as", "used"), [
    ("4.57.6", ["lm_head.bias"], "lm_head.bias"),
    (None, ["lm_head.bias"], "lm_head.bias"),
    ("4.57.6", ["lm_head.decoder.bias"], "lm_head.decoder.bias"),
    ("5.23.0", ["lm_head.bias"], None),
    ("5.23.0", [], None),  # after `resize_token_embeddings`
    ("5.24.0", ["lm_head.bias", "lm_head.decoder.bias"], "lm_head.decoder.bias"),
])  # fmt: skip
@torch.no_grad()
def test_the_bias_of_the_head_counts_where_the_version_that_wrote_it_counted_it(
    version: str | None, saved_as: list[str], used: str | None, tmp_path: Path
) -> None:
    """By the formula, whichever transformers is installed: 5.23 and 5.24 lose the bias of transformers 4.

    5.23 adds no bias. 5.24 adds `lm_head.decoder.bias` and leaves it zero where only `lm_head.bias` was saved.
    """
    saved(tmp_path, True)
    ids = torch.randint(3, 31, (1, 9))
    kept = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if name not in ("lm_head.bias", "lm_head.decoder.bias")}
    biases = {name: torch.randn(31, dtype=torch.float64) for name in saved_as}
    save_file({**kept, **biases}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": version}))
    ours = weights.convert(tmp_path)
    expected = weights.convert(tmp_path, head="hidden")(ids).hidden @ kept["lm_head.decoder.weight"].T
    assert torch.allclose(ours(ids).logits, expected + biases.get(used or "", torch.zeros(())), rtol=0, atol=1e-12)
    assert ours.config["origin"]["left_out"] == [name for name in saved_as if name != used]


def test_trains_and_saves(tmp_path: Path) -> None:
    saved(tmp_path, True)
    ours = weights.convert(tmp_path)
    ids = torch.randint(3, 31, (2, 20))
    with torch.no_grad():
        again = zoo.load(zoo.save(ours, tmp_path / "ours.safetensors"))
        assert torch.equal(ours(ids).logits, again(ids).logits)
    with pytest.warns(UserWarning, match="trained with dropout 0.05 inside attention"):
        ours.train()
    found = []
    for recompute in (True, False):
        ours.stack.recompute = recompute
        ours.zero_grad()
        torch.manual_seed(0)
        ours(ids).logits.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in zip(*found))
    assert all(bool(gradient.any()) for gradient in found[0])


@pytest.mark.parametrize(("settings", "message"), [
    ({"attn_layers": ["lsh", "full"]}, r"attn_layers=\['lsh', 'full'\] is not supported"),
    ({"axial_pos_shape": [4, 3, 4]}, r"axial_pos_shape=\[4, 3, 4\] is not supported"),
    ({"local_num_chunks_after": 1}, "local_num_chunks_after=1 is not supported"),
    ({"hidden_act": "selu"}, "hidden_act='selu' is not supported"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
    ({"rotary_value": True}, "rotary_value"),
])  # fmt: skip
def test_what_is_not_converted_is_refused_by_name(settings: dict, message: str, tmp_path: Path) -> None:
    saved(tmp_path, True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(Unsupported, match=message):
        weights.convert(tmp_path)


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    saved(tmp_path, True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["reformer.encoder.layers.1.surprise"] = tensors.pop("reformer.encoder.layers.0.attention.layer_norm.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing reformer.encoder.layers.0.attention.layer_norm.bias; unknown .*surprise"
    ):
        weights.convert(tmp_path)


# --- the local layers, which are no backend by themselves -------------------------------------------------------------

LOCAL = [{}, {"look_back": 2, "look_ahead": 1}, {"fill": 6, "look_ahead": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("options", LOCAL[::2], ids=str)
def test_local_layers_keep_the_contract(options: dict[str, Any]) -> None:
    for check in contract_checks("reformer.local", **options):
        if not check.slow and check.name != "activations_grow_as_declared":
            check()


def test_local_layers_are_a_companion_and_no_backend() -> None:
    assert "reformer.local" not in zoo.available()
    assert type(zoo.build("reformer.local", dim=8, heads=2, chunk=4)).__name__ == "ReformerLocal"
    with pytest.raises(ValueError, match=r"attention must be one of .*, got 'reformer.lokal'"):
        zoo.build("reformer.lokal", dim=8, heads=2)
    with pytest.raises(ValueError, match=r"attention must be one of .*, got 'full.local'"):
        zoo.build("full.local", dim=8, heads=2)


@pytest.mark.parametrize("options", LOCAL, ids=str)
def test_tiles_of_local_layers_are_their_definition(options: dict[str, Any]) -> None:
    for causal in (True, False):
        for length in (1, 2, 3, 7, 40):
            layer = zoo.build("reformer.local", dim=8, heads=2, causal=causal, chunk=3, **options).double()
            layer.tile = 4
            x = torch.randn(2, length, 8, dtype=torch.float64)
            tokens = zoo.Tokens.of(torch.arange(length) < torch.tensor([[length], [-(-length // 2)]]))
            found = {}
            for layer.kernel in ("tiles", "dense"):
                found[layer.kernel] = layer(x, tokens).hidden[tokens.valid]
            assert torch.allclose(found["tiles"], found["dense"], rtol=0, atol=1e-13)
