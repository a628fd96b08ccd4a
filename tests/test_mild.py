"""Rows whose scores are known to be small: known rightly, computed rightly, and by what the row may see alone."""

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.pattern import local
from attention_zoo.ops.pattern.mild import MILD, mild_rows

L, HEADS, D = 90, 4, 8
OPTIONS = {"longformer": {"window": 7}, "bigbird": {"block": 8, "random": 1, "kernel": "blocks"}}
CASES = [(name, causal, kv_heads) for name in OPTIONS for causal in (True, False) for kv_heads in (HEADS, 2)]


def layer(name, causal, kv_heads=HEADS, **more):
    torch.manual_seed(0)
    options = {**OPTIONS[name], "kv_heads": kv_heads, **more}
    built = zoo.build(name, dim=HEADS * D, heads=HEADS, causal=causal, **options)
    built.tile = 16  # no short call of a window, which knows no mild rows
    return built


def layouts():
    """Plain; padded on either side; documents in one row; each with a global token, which all that may see it see."""
    valid = torch.ones(2, L, dtype=torch.bool)
    padded = valid.clone()
    padded[0, :20], padded[1, 70:] = False, False
    document = (2**60 + torch.arange(L) // 37)[None].expand(2, L)
    flags = torch.zeros(2, L, dtype=torch.bool)
    flags[:, 40] = True
    return {
        "plain": Tokens.of(valid, flags),
        "padded": Tokens.of(padded, flags),
        "packed": Tokens.of(valid, flags, document),
    }


def operands(kv_heads, size=1.0, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [size * torch.randn(2, heads, L, D, generator=g, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads)]


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("name", "causal", "kv_heads"), CASES)
def test_no_row_that_is_called_mild_has_a_large_score(monkeypatch, name, causal, kv_heads, kind):
    """Whatever keys it may see by padding, document and causality; and rows of small norm are called so."""
    found = []
    monkeypatch.setattr(local, "mild_rows", lambda call, first: found.append((call, mild_rows(call, first))))
    q, k, v = operands(kv_heads, 4.0)
    q = q * torch.linspace(0.1, 4.0, L)[:, None]
    layer(name, causal, kv_heads).attend(q, k, v, *2 * [layouts()[kind]])
    (call, mild), *_ = found
    scores = call.q @ call.k.repeat_interleave(HEADS // kv_heads, 1).transpose(-1, -2) * call.scale
    largest = scores.abs().masked_fill(~call.seen(call.queries, call.keys), 0).amax(-1, keepdim=True)
    assert largest[mild].max() <= MILD
    assert mild.any()
    assert not mild.all()


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("name", "causal", "kv_heads"), CASES)
def test_small_and_large_scores_equal_the_definition(name, causal, kv_heads, kind):
    """All rows mild, some, none; in float64, gradients too."""
    mechanism, tokens = layer(name, causal, kv_heads).double(), layouts()[kind]
    for size in (1.0, 4.0, 30.0):
        inputs = [x.requires_grad_() for x in operands(kv_heads, size, torch.float64)]
        got = mechanism.attend(*inputs, tokens, tokens)
        want = mechanism.attend(*inputs, tokens, tokens, kernel="dense")
        asked = tokens.valid[:, None, :, None]
        got, want, grad = got * asked, want * asked, torch.randn_like(want)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * size)
        for mine, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad)):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("score", [0.999 * MILD, 1.001 * MILD, 1000.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_float32_has_room_for_what_is_called_mild(score, sign):
    """Every score at the limit, values large: neither overflow nor a row that vanishes."""
    q = torch.full((1, HEADS, L, D), 1.0)
    k = torch.full((1, HEADS, L, D), sign * score / D**0.5)
    v = 1e6 * torch.randn(1, HEADS, L, D)
    mechanism = layer("longformer", False, window=L)
    expected = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(mechanism.attend(q, k, v, kernel="tiles"), expected, rtol=1e-4, atol=10)


UNREACHABLE = {
    "the future": ("plain", slice(50, None), slice(None, 50)),
    "another sequence": ("plain", slice(None), slice(0, 0)),
    "padding before": ("padded", slice(None, 20), slice(20, None)),
    "another document": ("packed", slice(37, 74), slice(None, 37)),
}


@pytest.mark.parametrize("what", UNREACHABLE)
@pytest.mark.parametrize(("name", "causal", "kv_heads"), CASES)
def test_what_a_row_cannot_see_does_not_change_its_last_bit(name, causal, kv_heads, what):
    """Large content there makes other rows of the same tile take the other way."""
    kind, changed, kept = UNREACHABLE[what]
    if what == "the future" and not causal:
        kept = slice(0, 0)
    mechanism, tokens, inputs = layer(name, causal, kv_heads), layouts()[kind], operands(kv_heads)
    before = mechanism.attend(*inputs, tokens, tokens)
    for x in inputs:
        x[0, :, changed] *= 100
    after = mechanism.attend(*inputs, tokens, tokens)
    assert torch.equal(after[0, :, kept], before[0, :, kept])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after, before) or kind == "padded"
