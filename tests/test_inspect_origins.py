"""Inspection where columns are not the text's tokens: each weight goes to the tokens that a key is made of."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from references.h_transformer_1d import reference as h_transformer_reference
from test_inspect import layer_of
from torch import Tensor

from attention_zoo.contract import Output, Unsupported
from attention_zoo.inspect.figures import figures
from attention_zoo.inspect.probe import Call, calls_of
from attention_zoo.layout.layout import Layout
from attention_zoo.measure.memory import peak_memory
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapper import Wrapper

L = 37


def spread(weights: Tensor, members: list[list[int]]) -> Tensor:
    """[H, S] on columns -> [H, L] on the tokens that they are made of alike."""
    found = weights.new_zeros(len(weights), L)
    for column, tokens in enumerate(members):
        for token in tokens:
            found[:, token] += weights[:, column] / len(tokens)
    return found


def heads(layer: Any, projected: Tensor) -> Tensor:
    return projected.view(-1, layer.head_width)


def by_memory_compressed(layer: Any, x: Tensor) -> Tensor:
    """Group by group; the null key comes first and is no token's."""
    c, K, D = layer.compression, layer.kv_heads, layer.head_width
    weight, bias = layer.compress.weight.view(K, D, D, c), layer.compress.bias.view(K, D)
    members, keys = [[]], [layer.null_key.view(K, D)]
    for start in range(0, L, c):
        group = list(range(start, min(start + c, L)))
        if len(group) == c or not layer.causal:
            members.append(group)
            keys.append(bias + sum(torch.einsum("kde,ke->kd", weight[..., t], heads(layer, layer.to_k(x[0, j])))
                                   for t, j in enumerate(group)))  # fmt: skip
    rows = []
    for i in range(L):
        seen = [n for n, group in enumerate(members) if not layer.causal or not group or group[-1] <= i]
        scores = torch.stack([(heads(layer, layer.to_q(x[0, i])) * keys[n]).sum(-1) for n in seen], -1)
        rows.append(spread((layer.scale * scores).softmax(-1), [members[n] for n in seen]))
    return torch.stack(rows, 1)


def by_compressive(layer: Any, x: Tensor) -> Tensor:
    """Token by token: compressed states, memory, own segment."""
    S, M, c, C, E = layer.segment_length, layer.memory_length, layer.ratio, layer.compressed_length, layer.dim
    step = 2 if layer.compression == "dilated" else 1
    rows = []
    for i in range(L):
        start = max(0, i // S * S - M) // c * c
        members, states = [], []
        for g in range(max(0, start // c - C), start // c):
            taps = [g * c + c - 1 - (c - 1 - t) * step for t in range(c)]
            members.append([at for at in taps if at >= 0])
            if layer.compression == "mean":
                states.append(x[0, members[-1]].mean(0))
            else:
                conv = layer.compress.conv
                states.append(conv.bias + sum(conv.weight[:, :, t] @ x[0, at] for t, at in enumerate(taps) if at >= 0))
        distances = [i - start + len(states) - n for n in range(len(states))]
        for j in range(start, i + 1):
            members.append([j])
            states.append(x[0, j])
            distances.append(i - j)
        scores = []
        for state, distance in zip(states, distances):
            turns = distance / 10_000 ** (2 * torch.arange(E // 2, dtype=torch.float64) / E)
            r = heads(layer, layer.to_r(torch.cat([turns.sin(), turns.cos()])))
            q, k = heads(layer, layer.to_q(x[0, i])), heads(layer, layer.to_k(state))
            scores.append(((q + layer.u) * k).sum(-1) + ((q + layer.v) * r).sum(-1))
        rows.append(spread((layer.scale * torch.stack(scores, -1)).softmax(-1), members))
    return torch.stack(rows, 1)


def by_h_transformer(layer: Any, x: Tensor) -> Tensor:
    """The reference, pair by pair, asked for one key after the other."""
    found = []
    for j in range(L):
        kept: list[Tensor] = []

        def name(module: Any, given: Any, made: Tensor, j: int = j) -> Tensor:
            return torch.full_like(made, float(torch.equal(given[0], x[0, j])))

        hooks = [
            layer.to_v.register_forward_hook(name),
            layer.to_out.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0])),
        ]
        h_transformer_reference(layer, x, Layout.plain(1, L))
        for hook in hooks:
            hook.remove()
        found.append(torch.stack(kept).view(L, layer.heads, -1)[..., 0].T)
    return torch.stack(found, -1)


DERIVED = [
    ("memory_compressed", {}, by_memory_compressed),
    ("memory_compressed", {"causal": False}, by_memory_compressed),
    ("compressive", {"compression": "mean"}, by_compressive),
    ("compressive", {"compression": "conv"}, by_compressive),
    ("compressive", {"compression": "dilated"}, by_compressive),
    ("h_transformer_1d", {}, by_h_transformer),
]


@pytest.mark.parametrize(("name", "options", "definition"), DERIVED)
@torch.no_grad()
def test_derived_keys_weigh_the_tokens_that_they_are_made_of(name: str, options: Any, definition: Any) -> None:
    layer, x = layer_of(name, **options), torch.randn(1, L, 16, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # no null value is zero
    call, wanted = Call.of(layer, x), definition(layer, x)
    torch.testing.assert_close(call.weights(torch.eye(L)), wanted, rtol=0, atol=1e-11)
    found = figures(call, window=3, sinks=2, blocks=8, exact=L)
    assert found["mass"] == pytest.approx(wanted.sum(-1).mean(-1).tolist(), abs=1e-9)
    far = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    assert found["outside"] == pytest.approx((wanted * (far > 3)).sum(-1).mean(-1).tolist(), abs=1e-9)
    if layer.causal:
        cheap = figures(call, window=3, sinks=2, blocks=8, exact=0)
        assert cheap["distance"] == pytest.approx(found["distance"], abs=1e-4)


def inside_of(model: Transformer, ids: Tensor) -> tuple[list[Call], list[list[Tensor]]]:
    """The calls, and by the definition of patterns the weights of each call of each layer on its own columns."""
    calls, kept = calls_of(model, ids), []
    for call in calls:
        layer: Any = call.layer
        weights = []
        for part in call.parts:
            x, tokens, source = part.given
            other, keys = (source.hidden, source.tokens) if layer.cross else (x, tokens)
            q, k = (to(of[0]).unflatten(-1, (layer.heads, -1)).transpose(0, 1)
                    for to, of in ((layer.to_q, x), (layer.to_k, other)))  # fmt: skip
            weights.append((layer.scale * q @ k.mT + layer.full_bias(tokens, keys)[0]).softmax(-1))
        kept.append(weights)
    return calls, kept


def model_of(attention: Any, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(attention=attention, vocab=256, dim=16, heads=2, **options).double()


def ids_of() -> Tensor:
    return torch.randint(0, 256, (1, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["global_tokens", "hierarchical", "memory_tokens"])
@torch.no_grad()
def test_what_wrappers_put_in_is_no_token(name: str, causal: bool) -> None:
    size = 8
    options = {"global_tokens": {"count": 3}, "hierarchical": {"segment_length": size, "layout": "S"}}
    given = options.get(name, {"count": 4, "segment_length": size})
    model = model_of({"name": name, **given}, causal=causal, depth=2)
    calls, kept = inside_of(model, ids_of())
    assert len(calls) == 2, "a layer that is called for each segment is one layer"
    for call, weights in zip(calls, kept):
        wanted = torch.zeros(2, L, L, dtype=torch.float64)
        for i in range(L):
            for j in range(L):
                if name == "global_tokens":
                    wanted[:, i, j] = weights[0][:, 3 + i, 3 + j]
                elif name == "hierarchical":
                    at, key = (p + p // size + (not causal) for p in (i, j))
                    wanted[:, i, j] = weights[0][:, at, key]
                elif i // size == j // size:
                    wanted[:, i, j] = weights[i // size][:, 4 + i % size, 4 + j % size]
        torch.testing.assert_close(call.weights(torch.eye(L)), wanted, rtol=0, atol=1e-11)
        seen = figures(call, window=3, sinks=2, blocks=8, exact=L)["mass"]
        assert seen == pytest.approx(wanted.sum(-1).mean(-1).tolist(), abs=1e-9)
        assert max(seen) < 1 or (name, causal) == ("hierarchical", True), "which reads no summary of its own segment"


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_groups_of_a_shorter_stack_are_their_tokens(causal: bool) -> None:
    model = model_of("full", causal=causal, shorten="1@1 1@2 1@4 1@2 1@1")
    calls, kept = inside_of(model, ids_of())
    for call, weights, factor in zip(calls, kept, (1, 2, 4, 2, 1), strict=True):
        count = -(-L // factor)
        # causal, twice two tokens that end with the one that opens a group are four that do
        start = (1 - factor) * causal
        members = [[j for j in range(start + g * factor, start + (g + 1) * factor) if 0 <= j < L] for g in range(count)]
        wanted = torch.stack([spread(weights[0][:, i // factor], members) for i in range(L)], 1)
        torch.testing.assert_close(call.weights(torch.eye(L)), wanted, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_funnel_that_reads_tokens_before_they_are_pooled() -> None:
    shorten = {"name": "funnel", "layout": "1@1 2@2 1@1", "keys": "all"}
    model = model_of("full", causal=False, shorten=shorten, pre_norm=False)
    calls, kept = inside_of(model, ids_of())
    pairs, tokens = [[j for j in (2 * g, 2 * g + 1) if j < L] for g in range(-(-L // 2))], [[j] for j in range(L)]
    queries = 1, 2, 2, 1
    for call, weights, factor, members in zip(calls, kept, queries, (tokens, tokens, pairs, tokens), strict=True):
        wanted = torch.stack([spread(weights[0][:, i // factor], members) for i in range(L)], 1)
        torch.testing.assert_close(call.weights(torch.eye(L)), wanted, rtol=0, atol=1e-11)


class Mixing(Wrapper):
    """A wrapper that calls what is inside with no tokens at all, but sums of them."""

    name = "mixing"

    def forward(
        self, x: Tensor, tokens: Any = None, *, state: Any = None, source: Any = None, choices: Any = None
    ) -> Output:
        return self.inside(x.cumsum(1), tokens)


def test_what_is_refused_says_why() -> None:
    x = torch.randn(1, L, 16, dtype=torch.float64)
    with pytest.raises(Unsupported, match="its keys are another text's"):
        Call.of(layer_of("full", causal=False, cross=True), x)
    with pytest.raises(Unsupported, match="neither tokens nor its own"):
        calls_of(Mixing(inner=model_of("full", depth=1).stack, dim=16, heads=2), x)


@torch.no_grad()
def test_of_an_encoder_and_a_decoder_the_encoder_reads_the_text() -> None:
    encoder, decoder = model_of("full", causal=False, depth=1, head="hidden"), model_of("full", depth=1, cross=True)
    (call,), (wanted,) = (
        calls_of(each, ids_of()) for each in (EncoderDecoder(encoder=encoder, decoder=decoder), encoder)
    )
    torch.testing.assert_close(call.weights(torch.eye(L)), wanted.weights(torch.eye(L)), rtol=0, atol=0)


LONG: dict[str, dict[str, Any]] = {
    "longformer": {"attention": "longformer"},
    "reformer": {"attention": "reformer"},
    "transformer_xl": {"attention": "transformer_xl"},
    "compressive": {"attention": "compressive"},
    "memory_compressed": {"attention": "memory_compressed"},
    "h_transformer_1d": {"attention": "h_transformer_1d"},
    "memory_tokens": {"attention": {"name": "memory_tokens", "segment_length": 512}},
    "hierarchical": {"attention": {"name": "hierarchical", "layout": "S"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_memory_grows_as_the_text_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_zoo.inspect.rows.AT_ONCE", 2**18)
    torch.manual_seed(0)
    model = Transformer(**{"vocab": 256, "dim": 16, "heads": 1, "depth": 1, **LONG[name]})

    def peak(length: int) -> int:
        ids = torch.randint(0, 256, (1, length))

        def look() -> None:
            for call in calls_of(model, ids):
                figures(call, window=256, sinks=4, blocks=64, exact=64)

        return peak_memory(look).peak_bytes

    peak(1024)  # what is made once
    short, long = peak(4096), peak(8192)
    assert long < 2.2 * short
    assert long < 8192 * 8192 * 4 / 4, "far from all pairs"


RESIDENT = """
import resource
import torch
from attention_zoo.inspect.figures import figures
from attention_zoo.inspect.probe import calls_of
from attention_zoo.model.transformer import Transformer

model = Transformer(vocab=256, dim=16, heads=2, depth=1, attention="longformer")

def most(length):
    for call in calls_of(model, torch.randint(0, 256, (1, length))):
        figures(call, window=256, sinks=4, blocks=64, exact=64)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = most(1024)
print(most(12288) - before)
"""


@pytest.mark.slow
def test_what_is_resident_is_far_from_all_pairs() -> None:
    """Tensors alone would not show it: small results between large chunks kept each chunk's place from the next."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert int(done.stdout) < 12288 * 12288 * 4 / 2
