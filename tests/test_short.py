"""Short calls: what runs them equals the definition, is taken where it may be, and says why where it may not."""

import pytest
import torch
from count_reads import Count

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.pattern import facts, short, short_band
from attention_zoo.ops.pattern.short import KEYS


@pytest.fixture
def always_worth_it(monkeypatch):
    monkeypatch.setattr(short, "WORTH", {False: 1e9, True: 1e9})


def build(name, **options):
    torch.manual_seed(0)
    return zoo.build(name, dim=32, heads=4, **options).double()


def operands(L, S, heads=4, batch=2, lay=lambda x: x):
    g = torch.Generator().manual_seed(L + S)
    shapes = ((batch, 4, L, 8), (batch, heads, S, 8), (batch, heads, S, 8))
    return [lay(torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_() for shape in shapes]


def compare(layer, kernel, qkv, *tokens):
    found = []
    for name in (kernel, "dense"):
        out = layer.attend(*qkv, *tokens, kernel=name)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found.append([out, *torch.autograd.grad(out, qkv, weight)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


OPTIONS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "block": 7, "random": 5, "positions": "alibi", "kv_heads": 2},
    {"causal": False, "block": 7, "positions": "alibi"},
    {"causal": False, "plan": "reference"},
    {"causal": False, "plan": "reference_eval"},
    {"causal": False, "extra_global_tokens": 2, "window_blocks": 1, "random": 0},
    {"causal": True, "extra_global_tokens": 2, "random": 0},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["plain", "padding", "right", "holes", "documents", "holes, global"])
def test_links_that_global_blocks_make_good_for_take_no_bias(causal, kind, monkeypatch, always_worth_it):
    layer, taken = build("bigbird", block=7, causal=causal), []
    monkeypatch.setattr(short, "run_sdpa", lambda call, run=short.run_sdpa: taken.append(call) or run(call))
    for L in (15, 22, 27, 28):
        tokens = laid(kind, 3, L)
        compare(layer, "short", operands(L, L, batch=3), tokens, tokens)
        assert taken or kind != "plain", L  # four blocks, of which the first and the last see and are seen by all
        taken.clear()
    tokens = laid(kind, 3, 63)  # nine, or three documents of few
    compare(layer, "short", operands(63, 63, batch=3), tokens, tokens)
    assert not taken or kind == "documents"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bigbird_equals_the_definition(options, always_worth_it):
    layer = build("bigbird", **{"block": 11, **options})
    for L in (1, 2, 10, 11, 12, 257, 311):
        compare(layer, "short", operands(L, L, layer.kv_heads))
    if layer.causal:  # later queries: they begin inside a block
        for L, S in ((1, 34), (20, 39), (270, 311)):
            compare(layer, "short", operands(L, S, layer.kv_heads))


def laid(kind, batch, L):
    """Rows that differ: padding on both sides and inside, a row of nothing else, documents, some global tokens."""
    g = torch.Generator().manual_seed(L)
    valid, document, flags = torch.ones(batch, L, dtype=torch.bool), None, None
    if "padding" in kind:
        valid[0, -1:], valid[1, : L // 3] = False, False
    if "right" in kind:
        valid = torch.arange(L) < torch.randint(0, L + 1, (batch, 1), generator=g)
    if "holes" in kind:
        valid[0, 1::3], valid[2] = False, False
    if "documents" in kind:
        document = torch.randint(0, 3, (batch, L), generator=g).sort(1).values
    if "global" in kind:
        flags = valid & (torch.rand(batch, L, generator=g) < 0.1)
    return Tokens.of(valid, flags, document)


@pytest.mark.parametrize("kind", ["padding", "right, global", "documents", "padding, holes, documents, global"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_that_differ_equal_the_definition(options, kind, always_worth_it):
    layer = build("bigbird", **{"block": 4, **options})
    for L in (1, 7, 61):
        tokens = laid(kind, 3, L)
        compare(layer, "short", operands(L, L, layer.kv_heads, batch=3), tokens, tokens)
        if layer.causal and L > 7:
            last = slice(L - 20, L)
            compare(layer, "short", operands(20, L, layer.kv_heads, batch=3), tokens.cut(last), tokens)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_at_the_end_beside_a_whole_row_takes_no_bias_of_its_own(options, monkeypatch, always_worth_it):
    """Documents and global tokens where all have them: padding is the future of all. Elsewhere it is told."""
    monkeypatch.setattr(short, "CELLS", 0)
    layer, L = build("bigbird", **{"block": 4, **options}), 61
    qkv = operands(L, L, layer.kv_heads, batch=3)
    column = torch.arange(L)
    document, flags = (column > 22).long() + (column > 40), (column % 30 == 3).expand(3, L)
    for count in ([50, 61, 23], [61, 61, 60], [0, 61, 1]):
        valid = column < torch.tensor(count)[:, None]
        for marked in (None, flags & valid):
            tokens = Tokens.of(valid, marked, document.expand(3, L))
            assert (dict(layer.explain(*qkv, tokens, tokens))["short"] is None) == layer.causal
            if layer.causal:
                compare(layer, "short", qkv, tokens, tokens)
    valid[1, 30] = False
    holes = Tokens.of(valid, None, document.expand(3, L))
    assert "batch rows differ" in dict(layer.explain(*qkv, holes, holes))["short"]


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_at_its_longest(causal, always_worth_it):
    """A row may see nothing among the first hundreds of keys."""
    layer = build("bigbird", causal=causal, extra_global_tokens=1, random=1, block=64)
    compare(layer, "short", operands(KEYS, KEYS, batch=1))


def test_channels_need_not_lie_side_by_side(always_worth_it):
    def transposed(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for causal in (True, False):
        qkv = operands(60, 60, lay=transposed)
        compare(build("bigbird", causal=causal, block=8), "short", qkv)
        compare(build("longformer", causal=causal, window=60), "sdpa", qkv)


def test_what_is_remembered_of_one_call_does_not_leak_into_another(always_worth_it):
    layer = build("bigbird", causal=False, block=8)
    flags = torch.zeros(2, 60, dtype=torch.bool)
    flags[:, 16:24] = True
    marked = Tokens.of(torch.ones_like(flags), flags)
    for _ in range(2):
        for L in (60, 57):
            compare(layer, "short", operands(L, L))
        compare(layer, "short", operands(60, 60), marked, marked)
    with torch.inference_mode():
        layer.attend(*operands(41, 41))
    compare(layer, "short", operands(41, 41))


def test_which_calls_of_bigbird_are_short():
    layer = build("bigbird", block=32)

    def reason(L, tokens=None, dtype=torch.float64):
        qkv = [x.detach().to(dtype) for x in operands(L, L)]
        return dict(layer.explain(*qkv, tokens, tokens))["short"]

    whole = torch.ones(2, 100, dtype=torch.bool)
    some = torch.zeros_like(whole)
    some[:, 40] = True
    padded = whole.clone()
    padded[0, 90:] = False
    assert "no short call" in reason(KEYS + 1)
    linked = (2 + 3) * 32 + 32  # window, random, first block
    assert reason(3 * linked) is None
    assert f"{3 * linked + 1} keys are no short call where a query sees {linked}" in reason(3 * linked + 1)
    assert reason(100, dtype=torch.bfloat16) is None
    assert reason(100, Tokens.of(padded)) is None
    assert reason(100, Tokens.of(whole, some)) is None
    layer = build("bigbird", block=4)
    assert reason(512) is None
    assert "no short call" in reason(513)
    layer = build("bigbird", block=1, causal=False)
    lengths = Tokens.of(torch.arange(400) < torch.tensor([[400], [399]]))
    assert "too many blocks of 1, in documents of 2 lengths" in reason(400, lengths)


@pytest.mark.parametrize("kind", ["plain", "padding", "documents"])
@pytest.mark.parametrize("causal", [True, False])
def test_operators_of_many_short_rows(causal, kind):
    """The recall step of a training: 32 rows of 64 tokens in blocks of 4. Gathering blocks takes 8 times as many."""
    layer, tokens = build("bigbird", block=4, causal=causal), laid(kind, 32, 64)
    qkv = operands(64, 64, batch=32)
    layer.attend(*qkv, tokens, tokens)
    with Count() as count:
        out = layer.attend(*qkv, tokens, tokens)
        torch.autograd.grad(out.sum(), qkv)
    assert count.operators < 150, count.operators


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_holds_every_key_is_full_attention(causal):
    layer = build("longformer", causal=causal, window=20, kv_heads=2)
    for L in (1, 2, 20, 21):
        compare(layer, "sdpa", operands(L, L, 2))
        assert dict(layer.explain(*operands(L, L, 2)))["sdpa"] is None
    assert "beyond the window" in dict(layer.explain(*operands(22, 22, 2)))["sdpa"]
    layer = build("longformer", causal=causal, window=20, dilation=2)
    assert "without gaps" in str(facts.shows_all(layer))
    assert "sdpa" not in dict(layer.explain(*operands(9, 9)))
    with pytest.raises(zoo.Unsupported, match="kernel=sdpa is not supported: it has no such kernel"):
        build("longformer", causal=causal, window=20, dilation=2, kernel="sdpa")
    layer = build("longformer", causal=causal, window=20, positions="alibi")
    assert "position scheme" in dict(layer.explain(*operands(9, 9)))["sdpa"]


BANDS = [
    {"window": 30},
    {"window": 3, "positions": "alibi", "kv_heads": 2},
    {"window": 5, "dilation": 3},
    {"window": 5, "dilation": [1, 2, 3, 7], "kv_heads": 2},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", BANDS, ids=str)
def test_a_band_equals_the_definition(options, causal):
    layer = build("longformer", causal=causal, **options)
    for L, S in ((1, 1), (2, 2), (31, 31), (256, 256), (1, 40), (20, 39), (31, 131)):
        compare(layer, "short", operands(L, S, layer.kv_heads))
        flags = torch.zeros(2, S, dtype=torch.bool)
        flags[:, [0, S // 2]] = True
        keys = Tokens.of(torch.ones_like(flags), flags)
        compare(layer, "short", operands(L, S, layer.kv_heads), keys.cut(slice(S - L, S)), keys)


def test_global_tokens_of_a_short_band_have_their_own_projections():
    layer, flags = build("longformer", causal=False, window=3), torch.zeros(2, 40, dtype=torch.bool)
    flags[:, [0, 17]] = True
    with torch.no_grad():
        layer.to_v_global.weight.mul_(2)
    x, tokens = torch.randn(2, 40, 32, dtype=torch.float64), Tokens.of(torch.ones_like(flags), flags)
    found = []
    for layer.kernel in ("short", "dense"):
        found.append(layer(x, tokens).hidden)
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)


def test_which_calls_of_a_band_are_short(monkeypatch):
    def reason(L, tokens=None, dtype=torch.float64, causal=False, **options):
        qkv = [x.detach().to(dtype) for x in operands(L, L)]
        layer = build("longformer", causal=causal, **options)
        return dict(layer.explain(*qkv, tokens, tokens))["short"]

    whole = torch.ones(2, 100, dtype=torch.bool)
    some = torch.zeros_like(whole)
    some[0, 40] = True
    padded = whole.clone()
    padded[0, 90:] = False
    assert reason(256, window=2) is None
    assert "257 keys are no short call at this window (at most 256)" in reason(257, window=2)
    assert reason(464, window=200) is None
    assert "at most 464" in reason(465, window=200)
    assert "at most 256" in reason(257, window=200, causal=True)  # tiles leave out the future
    assert "at most 256" in reason(257, window=20, dilation=10)
    assert f"at most {KEYS}" in reason(KEYS + 1, window=900)
    assert reason(100, window=2, dtype=torch.bfloat16) is None
    assert "round the bias" in reason(100, window=2, dtype=torch.bfloat16, positions="alibi")
    assert reason(100, Tokens.of(padded), window=2) is None
    assert reason(100, Tokens.of(whole, some), window=2) is None
    monkeypatch.setattr(short_band, "CELLS", 2 * 2 * 100 * 100 - 1)
    assert "batch rows differ" in reason(100, Tokens.of(padded), window=2)
    assert "batch rows differ" in reason(100, Tokens.of(whole, some), window=2)
    assert reason(100, window=2) is None


def test_half_precision_rounds_the_result_alone(always_worth_it):
    layer, flags = build("bigbird", causal=True, block=8, positions="alibi"), torch.ones(2, 60, dtype=torch.bool)
    qkv = [x.detach().bfloat16() for x in operands(60, 60)]
    got, wide = (
        layer.attend(*some, Tokens.of(flags), Tokens.of(flags), kernel="short")
        for some in (qkv, [x.float() for x in qkv])
    )
    assert torch.equal(got, wide.bfloat16())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_how_many_blocks_are_linked_is_told(options):
    layer = build("bigbird", **{"block": 11, **options})
    row = torch.arange(9)[None]
    assert layer.reach.most == layer.links(row, torch.full_like(row, 9))[0].shape[-1]
