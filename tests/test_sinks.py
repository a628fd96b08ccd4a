"""Sinks: the first tokens of a document stay in sight of a window, at constant memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Unsupported
from attention_zoo.attention.longformer import Longformer
from attention_zoo.model.state import state_bytes
from attention_zoo.testing import contract_checks

ASKED = (
    "reach_hides_nothing", "weights_are_what_reach_says", "fast_equals_slow", "the_future_never_changes_the_past",
    "padding_contents_never_matter", "documents_in_one_row_equal_documents_apart", "any_cut_equals_one_call",
    "ragged_prompts_decode_like_rows_alone", "large_scores_are_finite_and_right", "bfloat16_loses_no_more_than_dense",
)  # fmt: skip


class Streaming(Longformer):
    """Its causal form, with sinks."""

    name = "streaming"
    tiny = {"window": 3, "sinks": 2}
    declared = replace(Longformer.declared, two_sided=False)


class Cached(Streaming):
    """With positions inside the cache."""

    name = "cached"
    tiny = {"window": 3, "sinks": 2, "sink_positions": "cache"}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    ("mechanism", "positions"),
    [
        (Streaming, "none"),
        pytest.param(Cached, "rotary", marks=pytest.mark.slow),
        pytest.param(Cached, "alibi", marks=pytest.mark.slow),
    ],
)
def test_contract(mechanism: type[Longformer], positions: str, name: str) -> None:
    (check,) = (each for each in contract_checks(mechanism, positions=positions) if each.name == name)
    check()


def test_the_definition_is_a_window_and_the_first_tokens() -> None:
    layer = zoo.build("longformer", dim=8, heads=2, causal=True, window=3, sinks=2).double()
    x = torch.randn(1, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (layer._heads(project(x)) for project in (layer.to_q, layer.to_k, layer.to_v))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (j <= i) & ((i - j <= 3) | (j < 2))
    expected = ((q @ k.transpose(2, 3)) * layer.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert (layer.attend(q, k, v) - expected).abs().max() < 1e-12


def test_a_stream_keeps_the_sinks_and_no_more_than_a_window() -> None:
    layer = zoo.build("longformer", dim=8, heads=2, causal=True, window=4, sinks=2).eval()
    x = torch.randn(1, 600, 8, generator=torch.Generator().manual_seed(1))
    whole, state, sizes, said = layer(x).hidden, layer.initial_state(1), [], []
    with torch.no_grad():
        for column in range(600):
            tokens = zoo.Tokens.of(torch.ones(1, 1, dtype=torch.bool), start=torch.tensor([column]))
            out = layer(x[:, column : column + 1], tokens, state=state)
            state = out.state
            said.append(out.hidden)
            sizes.append(state_bytes(state))
    assert (torch.cat(said, 1) - whole).abs().max() < 1e-5
    assert max(sizes[300:]) <= max(sizes[:300])


def test_two_sided_attention_has_none() -> None:
    with pytest.raises(Unsupported, match="longformer: sinks=4 with causal=False is not supported"):
        zoo.build("longformer", dim=8, heads=2, causal=False, sinks=4)


def in_a_cache(layer: Longformer, x: torch.Tensor) -> torch.Tensor:
    """What StreamingLLM does, a token at a time: keys without positions, which are counted in what is kept."""
    q, k, v = (layer._heads(project(x)) for project in (layer.to_q, layer.to_k, layer.to_v))
    found = []
    for now in range(x.shape[1]):
        kept = [j for j in range(now + 1) if j < layer.sinks or now - j <= layer.window]
        place = torch.arange(len(kept))[None]
        mine = layer.scheme.rotate(q[:, :, now : now + 1], place[:, -1:])
        scores = mine @ layer.scheme.rotate(k[:, :, kept], place).mT * layer.scale
        if layer.positions == "alibi":
            scores = scores - (len(kept) - 1 - place) * torch.tensor(layer.scheme.slopes)[:, None, None]
        found.append(scores.softmax(-1) @ v[:, :, kept])
    return layer.to_out(torch.cat(found, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
@pytest.mark.parametrize("kernel", ["auto", "banded", "tiles", "dense"])
def test_positions_inside_the_cache_are_those_of_streaming_llm(kernel: str, positions: str) -> None:
    torch.manual_seed(0)
    layer = zoo.build(
        "longformer", dim=32, heads=4, window=6, sinks=3, sink_positions="cache", positions=positions, kernel=kernel
    ).double()  # fmt: skip
    x = torch.randn(1, 150, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.to_q.parameters(), *layer.to_k.parameters(), *layer.to_v.parameters()]
    out, expected = layer(x).hidden, in_a_cache(layer, x)
    assert (out - expected).abs().max() < 1e-12
    weight = torch.randn_like(out)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (out, expected))):
        assert (mine - theirs).abs().max() < 1e-10
    text = zoo.build("longformer", dim=32, heads=4, window=6, sinks=3, positions=positions).double()
    text.load_state_dict(layer.state_dict())
    apart = (text(x).hidden - out).abs().amax((0, 2))
    assert apart[:10].max() < 1e-12 < apart[12:].min(), "they differ once the cache is full"


def test_sinks_without_positions_cannot_be_counted_in_a_cache() -> None:
    for options in ({"sinks": 2}, {"positions": "rotary"}):
        with pytest.raises(Unsupported, match="sink_positions=cache"):
            zoo.build("longformer", dim=8, heads=2, sink_positions="cache", **options)
    layer = zoo.build("longformer", dim=8, heads=2, sinks=2, sink_positions="cache", positions="rotary")
    with pytest.raises(Unsupported, match="attend with sink_positions=cache"):
        layer.attend(*torch.zeros(3, 1, 2, 9, 4))


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_cached_positions_are_the_same_in_any_cut(positions: str) -> None:
    (check,) = (each for each in contract_checks(Cached, positions=positions) if each.name == "any_cut_equals_one_call")
    check()


@pytest.mark.parametrize("sink_positions", ["text", "cache"])
def test_a_model_writes_on_past_its_window_at_constant_memory(sink_positions: str) -> None:
    """Twenty windows of tokens, each from what a state of constant size holds, are those of one long call."""
    torch.manual_seed(0)
    options = {"window": 6, "sinks": 2, "sink_positions": sink_positions, "sink_logit": True}
    attention = {"name": "longformer", **options}
    model = zoo.Transformer(vocab=32, dim=32, depth=2, heads=4, positions="rotary", attention=attention).eval()
    ids = torch.randint(0, 32, (1, 5))
    written = zoo.generate(model, ids, steps=120, greedy=True)
    whole = torch.cat([ids, written], 1)
    with torch.no_grad():
        logits = model(whole).logits[:, 4:-1]
        assert torch.equal(logits.argmax(-1), written)
        state, sizes = model.initial_state(1), []
        for column in range(whole.shape[1]):
            state = model(whole[:, column : column + 1], state=state).state
            sizes.append(state_bytes(state))
    assert max(sizes[60:]) <= max(sizes[:60])
