"""BigBird and LSH attention by Triton against their definitions: outputs, every gradient, every layout."""

from __future__ import annotations

import pytest
import torch
from triton_device import close, on_triton

import attention_zoo as zoo
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.testing.case import Case

__all__ = ["on_triton"]
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # older interpreters' own
]


def equal(case: Case, layer, x, tokens, where: str, device: str) -> None:
    """kernel=triton against kernel=dense at valid tokens."""
    tokens = zoo.Tokens(*(field.to(device) for field in tokens))
    x = x.to(device).requires_grad_()
    found = {}
    for kernel in ("triton", "dense"):
        layer.kernel = kernel
        out = layer(x, tokens).hidden[tokens.valid]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found[kernel] = (out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]))
    for number, (a, b) in enumerate(zip(found["triton"], found["dense"])):
        close(a, b, f"{where}, result {number}")


@pytest.mark.parametrize(
    ("layout", "causal"),
    [("padded right", True), ("documents", True), ("global tokens, documents and holes", False)],
)
def test_bigbird_equals_its_definition(on_triton, causal, layout) -> None:
    case = Case.of("bigbird", block=8)
    layer = case.build(causal=causal, dtype=torch.float32).to(on_triton)
    tokens = dict(case.layouts(17))[layout]
    equal(case, layer, case.data(3, 17, dtype=torch.float32), tokens, layout, on_triton)


@pytest.mark.parametrize("options", [{"kv_heads": 1}, {"plan": "reference", "random": 1}], ids=str)
def test_bigbird_with_grouped_heads_and_with_links_that_count_twice(on_triton, options) -> None:
    case = Case.of("bigbird", block=4)
    layer = case.build(causal="plan" not in options, dtype=torch.float32, **options).to(on_triton)
    x, tokens = case.data(1, 33, dtype=torch.float32), zoo.Tokens.all_valid(1, 33)
    equal(case, layer, x, tokens, str(options), on_triton)


@pytest.mark.parametrize(("size", "causal"), [(0.5, True), (0.5, False), (90.0, True), (-1e4, True)])
def test_bigbird_with_a_sink(on_triton, size, causal) -> None:
    """Of a row that sees it alone, too: padding; and one that takes all, or nothing."""
    case = Case.of("bigbird", block=8)
    layer = case.build(causal=causal, dtype=torch.float32, sink_logit=True).to(on_triton)
    layer.sink.data = torch.linspace(size, size / 2, layer.heads).to(on_triton)
    tokens = dict(case.layouts(17))["global tokens, documents and holes"]
    equal(case, layer, case.data(3, 17, dtype=torch.float32), tokens, str(size), on_triton)


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_with_blocks_that_are_seen_whole(monkeypatch, on_triton, causal) -> None:
    """They need no mask: blocks of a power of two, full, of one document, and not of the future."""
    from attention_zoo.ops.softmax import triton

    monkeypatch.setattr(triton, "PIECE", 2)
    case = Case.of("bigbird", block=16)
    layer = case.build(causal=causal, dtype=torch.float32).to(on_triton)
    seen = []
    attend = triton.block_attention
    monkeypatch.setattr(
        triton, "block_attention", lambda *given, **more: seen.append(given[3].whole) or attend(*given, **more)
    )
    tokens = zoo.Tokens.of(torch.arange(70)[None] < 67)
    equal(case, layer, case.data(1, 70, dtype=torch.float32), tokens, f"causal={causal}", on_triton)
    assert seen[0] is not None
    assert int(seen[0].sum()) > 0


def test_bigbird_continues_from_a_cache(on_triton) -> None:
    layer = Case.of("bigbird", block=8).build(dtype=torch.float32).to(on_triton)
    x = torch.randn(1, 27, 16, device=on_triton)
    tokens = zoo.Tokens.all_valid(1, 27, on_triton)
    with torch.no_grad():
        layer.kernel = "dense"
        want = layer(x, tokens).hidden
        layer.kernel = "triton"
        first = layer(x[:, :11], tokens.cut(slice(0, 11)), state=layer.initial_state(1))
        rest = layer(x[:, 11:], tokens.cut(slice(11, 27)), state=first.state)
    close(torch.cat([first.hidden, rest.hidden], 1), want, "two calls")


@pytest.mark.parametrize(
    ("options", "causal"),
    [
        ({}, True),
        ({"attend_across_buckets": False}, True),
        ({"attend_across_buckets": False, "wrap": "reference"}, False),
        ({"look_ahead": 1, "chunk": 5}, True),
    ],
    ids=str,
)
def test_reformer_equals_its_definition(on_triton, causal, options) -> None:
    case = Case.of("reformer", **options)
    layer = case.build(causal=causal, dtype=torch.float32).to(on_triton)
    layout = "documents" if options else "padded left"
    tokens = dict(case.layouts(9))[layout]
    equal(case, layer, case.data(3, 9, dtype=torch.float32), tokens, layout, on_triton)


def test_reformer_steps_from_its_state(on_triton) -> None:
    layer = Case.of("reformer").build(dtype=torch.float32).to(on_triton)
    x, tokens = torch.randn(1, 11, 16, device=on_triton), zoo.Tokens.all_valid(1, 11, on_triton)
    with torch.no_grad():
        layer.kernel = "triton"
        state = layer(x[:, :10], tokens.cut(slice(0, 10)), state=layer.initial_state(1)).state
        step = layer(x[:, 10:], tokens.cut(slice(10, 11)), state=state).hidden
        layer.kernel = "dense"
        close(step[:, 0], layer(x, tokens).hidden[:, 10], "one step")


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, False), (torch.float16, False), (torch.float32, True)])
def test_a_block_that_everyone_sees_is_cut_into_pieces(monkeypatch, on_triton, dtype, large) -> None:
    """Lists of any content, one row that sees nothing, a key block in more lists than a piece has entries.

    `large`: dk and dv in passes of their own, and offsets of 64 bits, as for wide heads and long calls.
    """
    from attention_zoo.ops.softmax import triton

    monkeypatch.setattr(triton, "PIECE", 2)
    if large:
        monkeypatch.setattr(triton, "MANY_ELEMENTS", 1)
        monkeypatch.setattr(triton, "OFFSETS", 0)
    B, H, K, N, C, D = 1, 2, 1, 5, 4, 6
    L = N * C - 3
    links = torch.full((B, H, N, 3), -1)
    links[..., 0] = 0
    links[..., 1] = torch.arange(N)
    links[0, :, 0, 1] = -1  # a key block stands only once in a list
    links[0, 1, 3, 2] = 1
    weight = torch.zeros(B, H, N, 3)
    weight[0, 1, 3, 2] = 0.7
    time = torch.arange(N * C)[None].int()
    q_label, k_label = torch.zeros(1, N * C), torch.zeros(1, N * C)
    q_label[0, L:], k_label[0, L:], k_label[0, 5] = -2, -1, -1
    q_label[0, 2] = 7  # no key has this label
    packed = triton.Lists.packed(links, weight)
    lists = triton.Lists(
        *(x.to(on_triton) for x in packed[:2]), *(x.int().to(on_triton) for x in (time, q_label, time, k_label)),
        block=C, causal=True, strict=False, weight=packed[2].to(on_triton),
    )  # fmt: skip
    bias = torch.full((B, H, N, C, N * C), -torch.inf, dtype=torch.float64)
    for h in range(H):
        for n in range(N):
            for w in range(3):
                if links[0, h, n, w] >= 0:
                    start = int(links[0, h, n, w]) * C
                    bias[0, h, n, :, start : start + C] = weight[0, h, n, w].double()
    seen = (q_label[0, :, None] == k_label[0]) & (time[0][:, None] >= time[0])
    bias = bias.flatten(2, 3).masked_fill(~seen, -torch.inf)[:, :, :L]
    given = [torch.randn(B, heads, rows, D).to(dtype) for heads, rows in ((H, L), (K, N * C), (K, N * C))]
    exact = [x.double().requires_grad_() for x in given]
    want = dense(*exact, bias, scale=0.3)
    mine = [x.to(on_triton).requires_grad_() for x in given]
    got = triton.block_attention(*mine, lists, scale=0.3)
    grad = torch.randn_like(want)
    close(got, want, "output")
    assert not got[0, :, 2].any(), "a row that sees nothing yields zeros"
    gradients = zip(torch.autograd.grad(got, mine, grad.to(got)), torch.autograd.grad(want, exact, grad))
    for name, (a, b) in zip("qkv", gradients):
        close(a, b, f"gradient of {name}")


def test_a_second_derivative_is_refused(on_triton) -> None:
    layer = Case.of("bigbird", block=8).build(dtype=torch.float32, kernel="triton").to(on_triton)
    x = torch.randn(1, 5, 16, device=on_triton, requires_grad=True)
    (dx,) = torch.autograd.grad((x + layer(x).hidden).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(dx.sum(), x)


def test_they_refuse_with_a_reason(on_triton) -> None:
    x = torch.zeros(1, 9, 16, device=on_triton)
    cases = [
        (zoo.build("bigbird", dim=16, heads=1, kernel="triton", positions="alibi"), "position scheme adds"),
        (zoo.build("bigbird", dim=16, heads=1, kernel="triton", block=256), "blocks of 256 do not fit"),
        (zoo.build("bigbird", dim=16, heads=1, kernel="triton").double(), "not exact in float64"),
        (zoo.build("reformer", dim=16, heads=1, kernel="triton", correct_duplicates=True), "how many rounds"),
        (zoo.build("reformer", dim=16, heads=1, kernel="triton").double(), "not exact in float64"),
    ]
    for layer, reason in cases:
        layer = layer.to(on_triton)
        with pytest.raises(zoo.Unsupported, match=reason):
            layer(x.to(next(layer.parameters()).dtype))
