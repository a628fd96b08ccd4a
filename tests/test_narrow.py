"""Blocks of a narrow band, each with a window of its own, are the definition: outputs, gradients, what they hide."""

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.pattern import narrow
from attention_zoo.ops.softmax import tiles
from attention_zoo.ops.softmax.parts import Windows

KINDS = ("plain", "left", "right", "packed", "globals", "packed globals")


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Blocks in rows of a few dozen tokens, and some steps of them."""
    monkeypatch.setattr(narrow, "LEAST", 1)
    monkeypatch.setattr(narrow, "ROWS", 4)
    monkeypatch.setattr(narrow, "SCORES", 400)


@pytest.fixture
def blocks(monkeypatch):
    """Counts the blocks that run."""
    found = []

    class Counting(tiles.View):
        def __init__(self, part, *rest):
            super().__init__(part, *rest)
            if isinstance(part.keys, Windows):
                found.append(part.keys.blocks)

    monkeypatch.setattr(tiles, "View", Counting)
    return found


def layer(window, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = zoo.build("longformer", dim=32, heads=4, window=window, **options).to(dtype)
    made.tile = 7
    return made


def tokens(kind, L):
    g = torch.Generator().manual_seed(L)
    valid = torch.ones(2, L, dtype=torch.bool)
    if kind == "left":
        valid[0, : L // 2] = False
    if kind == "right":
        valid[1, L - L // 3 :] = False
    document = torch.randint(0, 3, (2, L), generator=g).sort(1).values if "packed" in kind else None
    flags = torch.rand(2, L, generator=g) < 0.1 if "globals" in kind else None
    return Tokens.of(valid, flags, document)


def operands(L, S, kv_heads=4, as_projected=True, dtype=torch.float64, size=1.0):
    g = torch.Generator().manual_seed(L)
    made = [size * torch.randn(2, n, h, 8, generator=g) for n, h in ((L, 4), (S, kv_heads), (S, kv_heads))]
    made = [x.to(dtype).transpose(1, 2) for x in made]
    return [(x if as_projected else x.contiguous()).requires_grad_() for x in made]


def run(made, kernel, qkv, queries, keys):
    out = made.attend(*qkv, queries, keys, kernel=kernel)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, qkv, weight.to(out.dtype))]


def compare(made, qkv, queries, keys=None, **tolerance):
    keys = queries if keys is None else keys
    tolerance = tolerance or {"atol": 1e-12, "rtol": 1e-12}
    for a, b in zip(run(made, "banded", qkv, queries, keys), run(made, "dense", qkv, queries, keys), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_heads", "positions", "as_projected"), [(4, "none", True), (2, "alibi", False)])
def test_blocks_are_the_definition(blocks, causal, kind, kv_heads, positions, as_projected):
    for window, L in ((1, 1), (1, 5), (4, 17), (5, 61), (32, 97)):
        made = layer(window, causal=causal, kv_heads=kv_heads, positions=positions)
        compare(made, operands(L, L, kv_heads, as_projected), tokens(kind, L))
    assert len(blocks) > 30, "few blocks have run"


@pytest.mark.parametrize("kind", KINDS)
def test_later_queries_have_windows_in_the_past(blocks, kind):
    made = layer(5, causal=True)
    for L, S in ((1, 61), (20, 61), (57, 61), (60, 61)):
        whole = tokens(kind, S)
        compare(made, operands(L, S), whole.cut(slice(S - L, S)), whole)
    assert blocks


def test_scores_above_100_and_single_precision(blocks):
    made = layer(4, causal=False)
    compare(made, operands(53, 53, size=12.0), tokens("plain", 53))
    made = layer(4, causal=True, dtype=torch.float32)
    compare(made, operands(53, 53, dtype=torch.float32), tokens("packed", 53), atol=2e-6, rtol=1e-5)
    assert blocks


def test_the_future_changes_no_bit_of_the_past(blocks):
    made, L, cut = layer(3, causal=True), 61, 30
    q, k, v = (x.detach() for x in operands(L, L))
    before = made.attend(q, k, v, kernel="banded")
    for x in (q, k, v):
        x[:, :, cut:] = 50 * torch.randn_like(x[:, :, cut:])
    after = made.attend(q, k, v, kernel="banded")
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])
    assert blocks


@pytest.mark.parametrize("kind", ["left", "right"])
def test_what_stands_in_padding_never_matters(blocks, kind):
    made, L = layer(3, causal=False, kernel="banded"), 61
    some, found = tokens(kind, L), []
    for filler in (0.0, torch.nan):
        x = torch.randn(2, L, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.masked_fill(~some.valid[..., None], filler).requires_grad_()
        out = made(x, some).hidden.masked_fill(~some.valid[..., None], 0)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), x)
        found.append((out, grad.masked_fill(~some.valid[..., None], 0)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert blocks


def test_a_learned_sink_takes_its_share_of_blocks(blocks):
    made = layer(3, causal=True, sink_logit=True)
    with torch.no_grad():
        made.sink.copy_(torch.linspace(-1, 2, 4))
    found = []
    for kernel in ("banded", "dense"):
        made.kernel = kernel
        made.zero_grad()
        out = made(torch.ones(1, 41, 32, dtype=torch.float64) * torch.linspace(-1, 1, 41)[:, None]).hidden
        out.pow(2).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert blocks


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "positions"), [("plain", "none"), ("packed", "alibi"), ("left", "none")])
def test_spans_learn_by_blocks(blocks, causal, kind, positions):
    """A bias of each head's own, which all blocks hand a gradient to, and edges that hand theirs to another."""
    torch.manual_seed(0)
    options = {"limit": 32, "ramp": 4, "causal": causal, "positions": positions}
    made = zoo.build("adaptive_span", dim=32, heads=4, **options).double()
    made.tile, some, found = 7, tokens(kind, 61), []
    with torch.no_grad():
        made.span.copy_(torch.tensor([0.05, 0.1, 0.2, 0.25]).view_as(made.span))
    x = torch.randn(2, 61, 32, dtype=torch.float64, requires_grad=True)
    for kernel in ("banded", "dense"):
        made.kernel = kernel
        out = made(x, some).hidden.masked_fill(~some.valid[..., None], 0)
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), [x, *made.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)
    assert blocks


def test_few_products_of_many_blocks(monkeypatch, blocks):
    """Whole rows of a head are one step, and a window of 16 costs 32 keys a query, not the 80 of a tile."""
    monkeypatch.undo()
    scored = []

    class Counting(tiles.Sums):
        def add(self, q, k, v, bias=None, **more):
            scored.append(q[..., 0].numel() * k.shape[1])
            super().add(q, k, v, bias, **more)

    monkeypatch.setattr(tiles, "Sums", Counting)
    layer(16, causal=True, dtype=torch.float32)(torch.randn(1, 2048, 32))
    assert len(scored) <= 4 + 3, "more steps than heads and both ends"
    assert sum(scored) <= 33 * 4 * 2048
