"""Batches of 0 rows: as torch's own layers, at every level: no rows come out, and gradients are zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CARRYING, REVERSIBLE, TWO_SIDED, VOCAB, entry
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Source, Tokens
from attention_zoo.integrations.multihead import MultiheadAttention

KINDS = [*((name, True) for name in CARRYING), *((name, False) for name in TWO_SIDED)]
NONE = Tokens.of(torch.ones(0, 7, dtype=torch.bool))


def learns_nothing(module: nn.Module, out: Tensor) -> None:
    out.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("tokens", [None, NONE], ids=["all", "tokens"])
@pytest.mark.parametrize(("name", "causal"), KINDS)
def test_a_layer(name: str, causal: bool, tokens: Tokens | None) -> None:
    layer = zoo.build(**entry(name, dim=16, heads=2, causal=causal))
    x = torch.randn(0, 7, 16, requires_grad=True)
    out = layer(x, tokens)
    assert out.hidden.shape == x.shape
    assert (None if out.choices is None else out.choices.shape) == layer.choices_shape(0, 7)
    learns_nothing(layer, out.hidden)
    assert x.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, tokens).hidden.dtype == layer(torch.randn(1, 7, 16)).hidden.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must be \[batch, length, 16\]"):
        layer(torch.randn(0, 7, 15))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CARRYING)
def test_a_state(name: str, gradients: bool) -> None:
    layer = zoo.build(**entry(name, dim=16, heads=2))
    model = zoo.Transformer(attention=entry(name), vocab=VOCAB, dim=16, heads=2, positions="none", short_conv=3)
    with torch.set_grad_enabled(gradients):
        state, running = layer.initial_state(0), model.initial_state(0)
        for length in (3, 1, 1, 5):
            tokens = Tokens.of(torch.ones(0, length, dtype=torch.bool))
            state = layer(torch.randn(0, length, 16), tokens, state=state).state
            state = layer.remember(torch.randn(0, length, 16), tokens, state=state)
            running = model(torch.zeros(0, length, dtype=torch.long), state=running).state


@pytest.mark.parametrize(
    "options",
    [{}, {"reversible": True}, {"short_conv": 3}, {"head": "classify", "classes": 3}, {"ff_chunks": 2}],
    ids=lambda options: "/".join(options) or "plain",
)
@pytest.mark.parametrize("name", CARRYING)
def test_a_model(name: str, options: dict[str, Any]) -> None:
    if "reversible" in options and name not in REVERSIBLE:
        with pytest.raises(zoo.Unsupported, match=f"{name}: reversible is not supported"):
            zoo.Transformer(attention=entry(name), vocab=VOCAB, dim=16, heads=2, **options)
        return
    own = {"extra_global_tokens": 2} if name == "bigbird" else {}
    for tokens in (None, NONE):
        model = zoo.Transformer(attention=entry(name, **own), vocab=VOCAB, dim=16, heads=2, positions="none", **options)
        out = model(torch.zeros(0, 7, dtype=torch.long), tokens)
        assert out.logits.shape == ((0, 3) if "head" in options else (0, 7, VOCAB))
        learns_nothing(model, out.logits)


@pytest.mark.parametrize("options", [{"greedy": True}, {"top_k": 3}, {"greedy": True, "cached": False}])
@pytest.mark.parametrize("name", CARRYING)
def test_generate(name: str, options: dict[str, Any]) -> None:
    model = zoo.Transformer(attention=entry(name), vocab=VOCAB, dim=16, heads=2, positions="none")
    assert zoo.generate(model, torch.zeros(0, 4, dtype=torch.long), steps=3, **options).shape == (0, 3)


def test_an_encoder_decoder_and_sources_without_tokens() -> None:
    shape = {"vocab": VOCAB, "dim": 16, "heads": 2}
    encoder = zoo.Transformer(attention=entry("bigbird"), causal=False, head="hidden", **shape)
    model = zoo.EncoderDecoder(encoder=encoder, decoder=zoo.Transformer(attention="longformer", cross=True, **shape))
    ids, source = torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 6, dtype=torch.long)
    learns_nothing(model, model(ids, source=source).logits)
    assert zoo.generate(model, ids, source=source, steps=2).shape == (0, 2)
    layer = zoo.build("full", dim=16, heads=2, causal=False, cross=True)
    for length in (3, 1):
        found = layer(torch.randn(2, length, 16), source=Source(torch.randn(2, 0, 16), Tokens.none(2))).hidden
        torch.testing.assert_close(found, layer.to_out.bias.expand_as(found))


@pytest.mark.parametrize(("rows", "length"), [(0, 11), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_attend_and_torchs_drop_in(name: str, rows: int, length: int) -> None:
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    ours = MultiheadAttention(16, 2, batch_first=True, attention=name)
    x = torch.randn(rows, length, 16)
    padding = torch.zeros(rows, length, dtype=torch.bool)
    assert theirs(x, x, x, need_weights=False)[0].shape == x.shape
    for given in (None, padding):
        assert ours(x, x, x, given, need_weights=False)[0].shape == x.shape
    layer = zoo.build(**entry(name, dim=16, heads=2))
    for kernel in ("auto", "tiles", "dense"):
        q, k, v = torch.randn(3, rows, 2, length, 8, requires_grad=True)
        out = layer.attend(q, k, v, kernel=kernel)
        assert out.shape == q.shape
        assert all(grad.shape == q.shape for grad in torch.autograd.grad(out.sum(), [q, k, v]))


def test_attend_of_the_others() -> None:
    reformer, memory = (zoo.build(**entry(name, dim=16, heads=2)) for name in ("reformer", "transformer_xl"))
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape)
        assert reformer.attend(q, q).shape == q.shape
        assert memory.attend(q, q, q, torch.randn(20, 2, 8)).shape == q.shape
