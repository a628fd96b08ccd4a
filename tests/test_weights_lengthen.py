"""A short model made long: the same function where the new attention sees as much, and ready to be trained on."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from pretrained import ragged_mask, saved
from small_models import far, small, some_ids

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer, Unsupported
from attention_zoo.integrations import weights

LONG = {
    "longformer": {"window": 40},
    "bigbird": {"block": 16, "random": 1},  # up to three blocks see each other
    "full": {"kernel": "tiles"},
}
SHORT = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {}),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, {}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"scale_attn_by_inverse_layer_idx": True}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"num_key_value_heads": 1, "head_dim": 6}),
}


@pytest.mark.parametrize("attention", LONG)
@pytest.mark.parametrize("family", SHORT)
@torch.no_grad()
def test_within_the_old_length_it_is_the_same_function(family, attention, tmp_path) -> None:
    model, config, options = SHORT[family]
    theirs = saved(model, config, tmp_path, **options)
    short = weights.convert(tmp_path)
    long = weights.lengthen(tmp_path, attention=attention, max_length=101, **LONG[attention])
    assert {layer.name for layer in long.stack.attentions} == {attention}
    for counts in ([37, 11, 1], [29, 29]):
        ids, mask = ragged_mask(theirs, counts)
        tokens = Tokens.of(mask.bool())
        assert far(short(ids, tokens).logits[mask.bool()], long(ids, tokens).logits[mask.bool()]) < 1e-12
    ids = torch.randint(3, 31, (1, 101))
    assert long(ids).logits.isfinite().all()
    again = zoo.load(zoo.save(long, tmp_path / "long.safetensors"))
    assert torch.equal(again(ids).logits, long(ids).logits)
    if attention == "longformer" and family in ("bert", "roberta"):
        everywhere = Tokens.of(torch.ones_like(ids[:, :30], dtype=torch.bool), torch.arange(30)[None] % 3 == 0)
        expected = short(ids[:, :30]).logits
        assert far(expected, long(ids[:, :30], everywhere).logits) < 1e-12, "global projections start as copies"


def test_learned_positions_repeat() -> None:
    short = small("full", positions={"name": "learned", "uncounted": 2}, max_length=5, causal=False)
    with torch.no_grad():
        short.positions.nowhere.normal_()
    long = weights.lengthen(short, attention="longformer", max_length=13, window=3)
    table = short.positions.table.weight
    assert torch.equal(long.positions.table.weight, torch.cat([table, table, table[:3]]))
    assert torch.equal(long.positions.nowhere, short.positions.nowhere)
    assert long.config["max_length"] == 13


def test_it_trains_on_at_the_new_length_and_leaves_the_old_model_alone(tmp_path) -> None:
    saved(hf.RobertaForMaskedLM, hf.RobertaConfig, tmp_path, dtype=torch.float32, attention_probs_dropout_prob=0.0)
    short = weights.convert(tmp_path)
    before = {name: tensor.clone() for name, tensor in short.state_dict().items()}
    long = weights.lengthen(short, attention="longformer", max_length=120, window=4).train()
    optimizer = torch.optim.Adam(long.parameters(), lr=1e-2)
    ids = torch.randint(3, 31, (2, 120), generator=torch.Generator().manual_seed(0))
    tokens = Tokens.of(torch.ones_like(ids, dtype=torch.bool), torch.arange(120).expand_as(ids) < 2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(long(ids, tokens).logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for name, p in long.named_parameters() if "nowhere" not in name)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in short.state_dict().items())


@torch.no_grad()
def test_a_rotary_model_may_be_stretched() -> None:
    short = small("full", positions="rotary")
    slow = {"name": "rotary", "scaling": "linear", "factor": 4.0}
    long = weights.lengthen(short, attention="longformer", window=50, positions=slow)
    ids = some_ids(length=9)
    tokens = Tokens.of(torch.ones_like(ids, dtype=torch.bool))
    spread = tokens._replace(position=4 * tokens.position, length=4 * tokens.length)
    assert far(short(ids).logits, long(ids, spread).logits) < 1e-12
    assert far(short(ids).logits, long(ids).logits) > 1e-3
    with pytest.raises(ValueError, match="positions must stay rotary with other options, got alibi"):
        weights.lengthen(short, attention="longformer", positions={"name": "alibi"})


def test_a_bigbird_gets_links_as_the_paper_draws_them(tmp_path) -> None:
    saved(hf.BigBirdForMaskedLM, hf.BigBirdConfig, tmp_path, block_size=2, num_random_blocks=1)
    model = weights.lengthen(tmp_path, attention="bigbird", block=2, random=1, plan="uniform", max_length=80)
    assert {layer.plan for layer in model.stack.attentions} == {"uniform"}
    assert [layer.seed for layer in model.stack.attentions] == [0, 1, 2]


def test_what_cannot_be_kept_is_refused() -> None:
    model = small("full", positions="learned", max_length=10)
    with pytest.raises(
        Unsupported, match=r"lengthen: attention=reformer is not supported: .* use longformer or bigbird"
    ):
        weights.lengthen(model, attention="reformer")
    with pytest.raises(Unsupported, match="attention=transformer_xl"):
        weights.lengthen(small("transformer_xl"), attention="full")
    with pytest.raises(ValueError, match="max_length must be an integer of at least 10, got 9"):
        weights.lengthen(model, attention="longformer", max_length=9)
    with pytest.raises(ValueError, match=r"nothing would be lost, stack.embedding invented"):
        weights.lengthen(model, attention="bigbird", extra_global_tokens=2)
    with pytest.raises(ValueError, match=r"to_k_global.bias, .* would be lost, nothing invented"):
        weights.lengthen(small("longformer"), attention="full")
    with pytest.raises(ValueError, match="option windw"):
        weights.lengthen(model, attention="longformer", windw=3)
    with pytest.raises(ValueError, match="two tables of axial positions cannot be tiled"):
        weights.lengthen(small("full", positions="axial", max_length=10), attention="longformer", max_length=20)
    assert isinstance(weights.lengthen(model, attention="longformer"), Transformer)
