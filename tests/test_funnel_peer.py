"""Funnels against transformers' FunnelModel on the same weights: outputs and gradients.

Its scores hold terms of positions and token types that are not here: their weights are zero. It rounds scores to
float32 before the softmax, which is taken out to compare in float64.
"""

from __future__ import annotations

import pytest
import torch
from small_models import far

from attention_zoo import Tokens, Transformer

transformers = pytest.importorskip("transformers")

LAYOUT, BLOCKS, DECODER = "1@1 2@2 1@4 2@1", [1, 2, 1], 2
RELATIVE = ("r_w_bias", "r_r_bias", "r_kernel", "r_s_bias", "seg_embed")


def released(pool_q_only, attention_type):
    config = transformers.FunnelConfig(
        vocab_size=7, block_sizes=BLOCKS, num_decoder_layers=DECODER, d_model=16, n_head=2, d_head=8, d_inner=32,
        hidden_act="gelu_new", hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, separate_cls=False,
        truncate_seq=False, pool_q_only=pool_q_only, attention_type=attention_type, pooling_type="mean",
    )  # fmt: skip
    model = transformers.FunnelModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in RELATIVE:
            parameter.data.zero_()
        else:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def funnel(keys):
    return Transformer(
        attention="full", vocab=7, dim=16, heads=2, causal=False, head="hidden", positions="none", pre_norm=False,
        feed_forward={"name": "gelu_tanh", "mult": 2}, norm={"name": "layer", "eps": 1e-9},
        embedding={"scale": 1.0, "normed": True}, shorten={"name": "funnel", "layout": LAYOUT, "keys": keys},
    ).double()  # fmt: skip


def pairs(theirs, ours):
    """Parameters that are the same, theirs first."""
    found = []

    def same(a, b):
        found.append((a.weight, b.weight))
        if a.bias is not None:
            found.append((a.bias, b.bias))

    embeddings = theirs.embeddings
    found.append((embeddings.word_embeddings.weight, ours.embedding.weight))
    same(embeddings.layer_norm, ours.embedding.norm)
    level = ours.stack
    inside = [level.before, level.inside.before, level.inside.inside]
    many = [*zip(theirs.encoder.blocks, inside, strict=True), (theirs.decoder.layers, level.after)]
    for layers, stack in many:
        for layer, block in zip(layers, stack.layers, strict=True):
            attention, feed = block.layers
            same(layer.attention.q_head, block.attention.to_q)
            block.attention.to_q.bias.data.zero_()  # theirs has none
            same(layer.attention.k_head, block.attention.to_k)
            same(layer.attention.v_head, block.attention.to_v)
            same(layer.attention.post_proj, block.attention.to_out)
            same(layer.attention.layer_norm, attention.norm)
            into = [each for each in feed.body.modules() if isinstance(each, torch.nn.Linear)]
            same(layer.ffn.linear_1, into[0])
            same(layer.ffn.linear_2, into[1])
            same(layer.ffn.layer_norm, feed.norm)
    for a, b in found:
        b.data.copy_(a.data)
    return found


@pytest.mark.parametrize("attention_type", ["relative_shift", "factorized"])
@pytest.mark.parametrize(("keys", "pool_q_only"), [("pooled", False), ("all", True)])
@pytest.mark.parametrize("length", [16, 13, 3])
def test_equals_the_released_model(length, keys, pool_q_only, attention_type, monkeypatch):
    torch.manual_seed(0)
    theirs, ours = released(pool_q_only, attention_type), funnel(keys)
    same = pairs(theirs, ours)
    ids = torch.randint(1, 7, (2, length))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    expected, found = theirs(ids).last_hidden_state, ours(ids).hidden
    assert far(found, expected) < 1e-11
    weight = torch.randn_like(expected)
    ours_ = torch.autograd.grad((found * weight).sum(), [b for _, b in same])
    theirs_ = torch.autograd.grad((expected * weight).sum(), [a for a, _ in same])
    for one, other in zip(ours_, theirs_):
        assert far(one, other) < 1e-9 * max(1, float(other.abs().max()))


@pytest.mark.parametrize(("keys", "pool_q_only"), [("pooled", False), ("all", True)])
def test_padding_that_cuts_no_group_is_the_same(keys, pool_q_only, monkeypatch):
    """One that does they leave out; see the module's docstring."""
    torch.manual_seed(0)
    theirs, ours = released(pool_q_only, "relative_shift"), funnel(keys)
    pairs(theirs, ours)
    ids = torch.randint(1, 7, (2, 16))
    valid = torch.arange(16) < torch.tensor([[16], [8]])
    expected = theirs(ids, attention_mask=valid.long()).last_hidden_state
    found = ours(ids, Tokens.of(valid)).hidden
    assert far(found[valid], expected[valid]) < 1e-5  # their scores are rounded
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    assert far(found[valid], theirs(ids, attention_mask=valid.long()).last_hidden_state[valid]) < 1e-11
    valid = torch.arange(16) < torch.tensor([[16], [6]])
    apart = ours(ids, Tokens.of(valid)).hidden - theirs(ids, attention_mask=valid.long()).last_hidden_state
    assert apart[0].abs().max() < 1e-11
    assert apart[1, :6].abs().max() > 1e-3
