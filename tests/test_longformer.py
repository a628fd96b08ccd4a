"""Dilated windows run as bands of residue classes: equal to the definition, at the cost of an undilated window."""

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.softmax import partial, tiles

DILATIONS = [1, 3, (1, 1, 2, 2), (3, 3, 1, 1), (1, 2, 3, 4), (2, 2, 2, 5)]


def layer(**options):
    torch.manual_seed(0)
    return zoo.build("longformer", dim=32, heads=4, **options).double()


def tokens(kind, L):
    g = torch.Generator().manual_seed(L)
    valid = torch.ones(2, L, dtype=torch.bool)
    if kind == "padded":
        valid[0, : L // 2], valid[1, L - L // 3 :] = False, False
    document = torch.randint(0, 3, (2, L), generator=g).sort(1).values if kind == "packed" else None
    flags = valid & (torch.rand(2, L, generator=g) < 0.15) if kind != "plain" else None
    return Tokens.of(valid, flags, document)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dilation", "kind", "kv_heads"),
    [
        (dilation, kind, (4, 2)[(i + j) % 2])
        for i, dilation in enumerate(DILATIONS)
        for j, kind in enumerate(["plain", "padded", "packed"])
    ],
)
def test_dilated_bands_equal_the_definition(dilation, kv_heads, kind, causal):
    for L, window, tile in ((1, 2, 2), (17, 2, 4), (61, 3, 7)):
        positions = "alibi" if L % 2 else "none"
        mine = layer(window=window, dilation=dilation, kv_heads=kv_heads, causal=causal, positions=positions)
        mine.tile = tile
        some, x = tokens(kind, L), torch.randn(2, L, 32, dtype=torch.float64)
        found = []
        for kernel in ("banded", "dense"):
            mine.kernel = kernel
            mine.zero_grad()
            given = x.clone().requires_grad_()
            out = mine(given, some).hidden.masked_fill(~some.valid[..., None], 0)
            out.pow(2).sum().backward()
            grads = [p.grad.clone() for p in mine.parameters() if p.grad is not None]
            found.append([out.detach(), given.grad, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("dilation", "kv_heads"), [(3, 4), ((1, 1, 3, 3), 2), ((1, 3, 1, 3), 2)])
@pytest.mark.parametrize("cut", [1, 22, 23, 24, 39])
def test_a_carried_past_is_one_call(dilation, kv_heads, cut):
    mine = layer(window=3, dilation=dilation, kv_heads=kv_heads, causal=True)
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    valid = torch.ones(1, 40, dtype=torch.bool)
    mine.kernel = "dense"
    whole = mine(x, Tokens.of(valid)).hidden
    mine.kernel = "banded"
    first = mine(x[:, :cut], Tokens.of(valid[:, :cut]), state=mine.initial_state(1))
    second = mine(x[:, cut:], Tokens.of(valid[:, cut:], start=cut), state=first.state)
    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], 1), whole)


@pytest.mark.parametrize("dilation", [4, (1, 1, 4, 4)])
def test_a_dilated_window_scores_no_more_pairs_than_a_plain_one(monkeypatch, dilation):
    scored = []

    class Counting(partial.Sums):
        def add(self, q, k, v, bias=None, **more):
            scored.append(q[..., 0].numel() * k.shape[2])
            super().add(q, k, v, bias, **more)

    monkeypatch.setattr(tiles, "Sums", Counting)
    counts = []
    for steps in (1, dilation):
        scored.clear()
        layer(window=32, dilation=steps, causal=False)(torch.randn(1, 2048, 32, dtype=torch.float64))
        counts.append(sum(scored))
    assert counts[1] <= 1.1 * counts[0], counts
