"""Inspection of layers with two attentions, of summaries, of kept states and of sources, held to slow loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from references.block_recurrent import _projected, _renewed, _turned
from references.compressive import _weights
from test_inspect import layer_of
from test_inspect_origins import ids_of, model_of, spread
from torch import Tensor

from attention_zoo.contract import Source
from attention_zoo.inspect.figures import figures
from attention_zoo.inspect.probe import Call, calls_of
from attention_zoo.layout.layout import Layout
from attention_zoo.model.encoder_decoder import EncoderDecoder

L, EXACT = 37, {"rtol": 0, "atol": 1e-11}
ASKED = {"window": 3, "sinks": 2, "blocks": 8, "exact": L}


def softmax_of(layer: Any, q: Tensor, k: Tensor, head: int, gaps: list[int] | None = None, at: int = 0) -> Tensor:
    """One query's weights of one head on keys [n, K·D]."""
    D, theirs = layer.head_width, head // (layer.heads // layer.kv_heads)
    query, keys = q[head * D : (head + 1) * D], k[:, theirs * D : (theirs + 1) * D]
    if gaps is not None and layer.positions == "rotary":
        query, keys = _turned(query, at), torch.stack([_turned(key, at - gap) for key, gap in zip(keys, gaps)])
    scores = layer.scale * (keys @ query)
    if gaps is not None and layer.positions == "alibi":
        scores = scores - 2.0 ** (-8 * (head + 1) / layer.heads) * torch.tensor(gaps)
    return scores.softmax(0)


def by_block_recurrent(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block by block, token by token: weights on tokens [H, L, L] and on vectors [H, L, S]; the window's share."""
    W, H, D, vectors = layer.window, layer.heads, layer.head_width, layer.initial
    near, far, share = (
        torch.zeros(H, L, L).double(),
        torch.zeros(H, L, layer.states).double(),
        torch.zeros(H, L).double(),
    )
    q, k, v = layer.local.to_q(x[0]), layer.local.to_k(x[0]), layer.local.to_v(x[0])
    of_state = layer.to_q_of_state(x[0])
    for start in range(0, L, W):
        block = range(start, min(start + W, L))
        state_k, state_v, state_q, state_q_of_tokens = _projected(layer, vectors)
        for i in block:
            seen = list(range(max(0, i - W), i + 1))
            for h in range(H):
                near[h, i, seen] = softmax_of(layer, q[i], k[seen], h, [i - j for j in seen], i)
                far[h, i] = softmax_of(layer, of_state[i], state_k, h)
                theirs = slice(h // (H // layer.kv_heads) * D, (h // (H // layer.kv_heads) + 1) * D)
                window, state = near[h, i] @ v[:, theirs], far[h, i] @ state_v[:, theirs]
                one, two = (
                    layer.to_out.weight[:, n * D : (n + 1) * D] @ made for n, made in ((h, window), (H + h, state))
                )
                share[h, i] = one.norm() / (one.norm() + two.norm())
        if len(block) == W:
            found = []
            for s in range(layer.states):
                looks = []
                for query, keys, values in ((state_q[s], state_k, state_v), (state_q_of_tokens[s], k[block], v[block])):
                    for h in range(H):
                        theirs = slice(h // (H // layer.kv_heads) * D, (h // (H // layer.kv_heads) + 1) * D)
                        looks.append(softmax_of(layer, query, keys, h) @ values[:, theirs])
                found.append(_renewed(layer, vectors[s], torch.cat(looks)))
            vectors = torch.stack(found)
    return near, far, share


@pytest.mark.parametrize(
    "options", [{}, {"positions": "rotary", "kv_heads": 1}, {"positions": "alibi", "gate": "lstm"}]
)
@torch.no_grad()
def test_a_recurrent_layer_has_a_window_and_vectors(options: dict[str, Any]) -> None:
    layer, x = layer_of("block_recurrent", **options), torch.randn(1, L, 16, dtype=torch.float64)
    window, vectors = Call.all_of(layer, x)
    near, far, share = by_block_recurrent(layer, x)
    torch.testing.assert_close(window.weights(torch.eye(L)), near, **EXACT)
    torch.testing.assert_close(vectors.weights(torch.eye(3)), far, **EXACT)
    seen, held = figures(window, **ASKED), figures(vectors, **ASKED)
    assert (seen["layer"], seen["keys"]) == ("alone: window", "tokens")
    assert (held["layer"], held["keys"]) == ("alone: state", "state vectors")
    assert seen["share"] == pytest.approx(share.mean(1).tolist(), abs=1e-9)
    assert held["share"] == pytest.approx((1 - share).mean(1).tolist(), abs=1e-9)
    assert all(0.01 < each < 0.99 for each in seen["share"]), "both parts count here"
    far_off = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    assert seen["distance"] == pytest.approx((near * far_off).sum(-1).mean(-1).tolist(), abs=1e-9)
    assert seen["outside"] == pytest.approx((near * (far_off > 3)).sum(-1).mean(-1).tolist(), abs=1e-9)
    for found, weights in ((seen, near), (held, far)):
        bits = -torch.special.xlogy(weights, weights).sum(-1).mean(-1) / math.log(2)
        assert found["entropy"] == pytest.approx(bits.tolist(), abs=1e-6)
        assert found["mass"] == pytest.approx([1.0, 1.0], abs=1e-9)
    assert [held[name] for name in ("distance", "outside", "sinks")] == [None] * 3, "vectors are nowhere"
    home = torch.arange(L) * 8 // L
    wanted = torch.stack([far[:, home == n].mean(1) for n in range(8)], 1)
    torch.testing.assert_close(torch.tensor(held["blocks"], dtype=torch.float64), wanted, **EXACT)


def test_the_model_of_a_recurrent_layer_is_as_it_was() -> None:
    """Nothing that inspection puts in the way is left there."""
    model, ids = model_of("block_recurrent", depth=2), ids_of()
    before = model.eval()(ids).logits
    for call in calls_of(model, ids):
        figures(call, **ASKED)
    assert torch.equal(model(ids).logits, before)
    assert not any("_states" in module.__dict__ for module in model.modules())


def by_most_used(layer: Any, x: Tensor) -> Tensor:
    """Segment by segment, with what is kept of the evicted ones found by the paper's rule; [H, L, L]."""
    S, M, c, C, E = layer.segment_length, layer.memory_length, layer.ratio, layer.compressed_length, layer.dim
    memory: list[int] = []
    kept: list[tuple[int, int]] = []  # number of the group, token
    rows, start = [], 0
    for begin in range(0, L, S):
        own = list(range(begin, min(begin + S, L)))
        for i in own:
            seen = [token for _, token in kept] + memory + [j for j in own if j <= i]
            distances = [i - start + start // c - group for group, _ in kept]
            distances += [i - j for j in seen[len(kept) :]]
            scores = []
            for token, distance in zip(seen, distances):
                turns = distance / 10_000 ** (2 * torch.arange(E // 2, dtype=torch.float64) / E)
                r, q, k = (
                    made.view(-1, layer.head_width)
                    for made in (layer.to_r(torch.cat([turns.sin(), turns.cos()])), layer.to_q(x[0, i]),
                                 layer.to_k(x[0, token]))
                )  # fmt: skip
                scores.append(((q + layer.u) * k).sum(-1) + ((q + layer.v) * r).sum(-1))
            rows.append(spread((layer.scale * torch.stack(scores, -1)).softmax(-1), [[token] for token in seen]))
        start = max(0, (begin + S) - M) // c * c
        old = [j for j in memory + own if j < start]
        memory = [j for j in memory + own if j >= start]
        if old and len(own) == S:
            used = sum(_weights(layer, x[0, i], [x[0, j] for j in old]).sum(0) for i in own)
            best = sorted(sorted(range(len(old)), key=lambda n, used=used: -float(used[n]))[: len(old) // c])
            kept += [(old[0] // c + n, old[index]) for n, index in enumerate(best)]
        kept = [(group, token) for group, token in kept if group >= start // c - C]
    return torch.stack(rows, 1)


@torch.no_grad()
def test_kept_states_are_the_tokens_that_they_were() -> None:
    layer = layer_of("compressive", compression="most_used")
    x = torch.randn(1, L, 16, dtype=torch.float64)
    wanted = by_most_used(layer, x)
    torch.testing.assert_close(Call.of(layer, x).weights(torch.eye(L)), wanted, **EXACT)
    torch.testing.assert_close(wanted.sum(-1), torch.ones(2, L).double())


def attention_of(layer: Any, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Weights [H, n, m] of queries on keys, of those seen; zero where none is."""
    q, k = (made.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for made in (layer.to_q(q), layer.to_k(k)))
    return (layer.scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


@pytest.mark.parametrize("layout", ["S D", "SD"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_summaries_are_the_tokens_of_their_segments(layout: str, causal: bool) -> None:
    size = 8
    model = model_of({"name": "hierarchical", "segment_length": size, "layout": layout}, causal=causal, depth=2)
    calls = calls_of(model, ids_of())
    names = [call.name for call in calls]
    both = ["layer 0", "layer 0: summaries", "layer 1", "layer 1: summaries"]
    assert names == (["layer 0", "layer 1"] if layout == "S D" else both)
    call = calls[1]
    x, tokens, _ = call.parts[0].given
    if layout == "SD":  # it reads what attention within segments has made of them
        layer = call.layer
        own, number = torch.arange(x.shape[1]), torch.arange(x.shape[1]) // (size + 1)
        seen = (number[:, None] == number) & ((own[:, None] >= own) if causal else torch.tensor(True))
        weights = attention_of(layer, x[0], x[0], seen)
        v = layer.to_v(x[0]).unflatten(-1, (2, -1)).transpose(0, 1)
        x = layer.among.norm(x + layer.to_out((weights @ v).transpose(0, 1).flatten(1)))
        layer = layer.among
    else:
        layer = call.layer
    position = Layout.of(tokens).position[0]
    is_summary = position % (size + 1) == (size if causal else 0)
    summaries = is_summary.nonzero()[:, 0]
    seen = summaries <= torch.arange(x.shape[1])[:, None] if causal else torch.ones(x.shape[1], len(summaries)).bool()
    weights = attention_of(layer, x[0], x[0, summaries], seen)
    members = [list(range(n * size, min((n + 1) * size, L))) for n in range(len(summaries))]
    column = (~is_summary).nonzero()[:, 0]
    asks = column if causal else summaries[torch.arange(L) // size]
    wanted = torch.stack([spread(weights[:, at], members) for at in asks], 1)
    torch.testing.assert_close(call.weights(torch.eye(L)), wanted, **EXACT)
    mass = wanted.sum(-1)
    if causal:
        assert mass[:, :size].eq(0).all(), "no segment is complete yet"
    torch.testing.assert_close(mass[:, size if causal else 0 :], torch.ones_like(mass[:, size if causal else 0 :]))
    outside = figures(call, **ASKED)["outside"]
    far = (torch.arange(L)[:, None] - torch.arange(L)).abs() > 3
    assert outside == pytest.approx((wanted * far).sum(-1).mean(-1).tolist(), abs=1e-9)


@torch.no_grad()
def test_a_source_is_another_text() -> None:
    layer = layer_of("full", causal=False, cross=True)
    x, other = torch.randn(1, 11, 16, dtype=torch.float64), torch.randn(1, L, 16, dtype=torch.float64)
    call = Call.of(layer, x, source=Source(other, Layout.plain(1, L)))
    wanted = attention_of(layer, x[0], other[0], torch.ones(11, L).bool())
    torch.testing.assert_close(call.weights(torch.eye(L)), wanted, **EXACT)
    found = figures(call, **ASKED)
    assert found["keys"] == "source tokens"
    assert torch.tensor(found["blocks"]).shape == (2, 8, 8)
    assert found["distance"] is found["outside"] is None, "of two texts"
    assert found["sinks"] == pytest.approx(wanted[..., :2].sum(-1).mean(-1).tolist(), abs=1e-9)
    bits = -torch.special.xlogy(wanted, wanted).sum(-1).mean(-1) / math.log(2)
    assert found["entropy"] == pytest.approx(bits.tolist(), abs=1e-6)
    few = figures(call, **{**ASKED, "blocks": 20})
    assert torch.tensor(few["blocks"]).shape == (2, 11, 20), "each side as long as it is"


@torch.no_grad()
def test_a_decoder_looks_at_itself_and_at_what_the_encoder_read() -> None:
    encoder = model_of("full", causal=False, depth=1, head="hidden", shorten="1@1 1@2 1@1")
    decoder = model_of("longformer", depth=2, cross=True)
    model = EncoderDecoder(encoder=encoder, decoder=decoder)
    target = torch.randint(0, 256, (1, 11))
    calls = calls_of(model, ids_of(), target)
    said = [(call.name, call.way.keys, call.asked, call.length) for call in calls if "decoder" in call.name]
    own, source = ("tokens", 11, 11), ("source tokens", 11, L)
    assert said == [(f"decoder layer {n}", *kind) for n, kind in enumerate([own, source, own, source])]
    given = calls[-1].parts[0].given
    hidden = encoder.eval()(ids_of()).hidden[0]
    wanted = attention_of(calls[-1].layer, given.x[0], hidden, torch.ones(11, L).bool())
    torch.testing.assert_close(calls[-1].weights(torch.eye(L)), wanted, **EXACT)
    with pytest.raises(ValueError, match="target is what a decoder beside an encoder has written"):
        calls_of(decoder, ids_of(), target)
