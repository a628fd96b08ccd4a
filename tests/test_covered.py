"""Blocks by tiles of all keys: equal to the definition, and taken where links cover most of what can be seen."""

import pytest
import torch
from test_short import OPTIONS, build, compare, laid, operands

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.pattern import covered


@pytest.fixture
def always_worth_it(monkeypatch):
    monkeypatch.setattr(covered, "WORTH", 1e9)


@pytest.fixture(params=[4, 64])
def tile(request, monkeypatch):
    """Queries of a tile: 8, so that tiles end everywhere, and 128."""
    monkeypatch.setattr(zoo.build("bigbird", dim=8, heads=1).__class__, "tile", request.param)


@pytest.mark.parametrize("options", [*OPTIONS, {"causal": True, "sink_logit": True}], ids=str)
def test_it_equals_the_definition(options, tile, always_worth_it):
    layer = build("bigbird", **{"block": 11, **options})
    for L in (1, 2, 10, 11, 12, 137):
        compare(layer, "covered", operands(L, L, layer.kv_heads))
    if layer.causal:  # later queries: they begin inside a block
        for L, S in ((1, 34), (20, 39), (90, 131)):
            compare(layer, "covered", operands(L, S, layer.kv_heads))


@pytest.mark.parametrize("kind", ["padding", "right, global", "documents", "padding, holes, documents, global"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_that_differ_equal_the_definition(options, kind, tile, always_worth_it):
    layer = build("bigbird", **{"block": 4, **options})
    for L in (1, 7, 61):
        tokens = laid(kind, 3, L)
        compare(layer, "covered", operands(L, L, layer.kv_heads, batch=3), tokens, tokens)
        if layer.causal and L > 7:
            last = slice(L - 20, L)
            compare(layer, "covered", operands(20, L, layer.kv_heads, batch=3), tokens.cut(last), tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_large_scores_equal_the_definition(causal, tile, always_worth_it):
    layer, (q, k, v) = build("bigbird", causal=causal, block=4), operands(61, 61, batch=3)
    q = (q * 300).detach().requires_grad_()
    tokens = laid("padding, documents", 3, 61)
    assert float((q @ k.mT).detach().max()) * layer.scale > 100
    compare(layer, "covered", [q, k, v], tokens, tokens)


def test_what_is_hidden_changes_nothing(tile, always_worth_it):
    """The future and other documents at the same shapes, bit for bit; padding in outputs and gradients."""
    layer, L = build("bigbird", causal=True, block=4), 61
    document = (torch.arange(L) > 22).long().expand(2, L)
    valid = torch.arange(L).expand(2, L) != 40
    tokens = Tokens.of(valid, None, document)
    q, k, v = (x.detach() for x in operands(L, L))
    seen = torch.arange(L)[:, None] >= torch.arange(L)
    seen = seen & (document[0][:, None] == document[0]) & valid[0]
    before = layer.attend(q, k, v, tokens, tokens, kernel="covered")
    for query in (3, 22, 23, 39, 41, 60):
        hidden = ~seen[query]
        others = [x.masked_fill(hidden[:, None], 0) + 5 * hidden[:, None] for x in (k, v)]
        after = layer.attend(q, *others, tokens, tokens, kernel="covered")
        assert after[:, :, query].equal(before[:, :, query])


def test_half_precision_rounds_the_result_alone(always_worth_it):
    layer, qkv = build("bigbird", causal=True, block=4), [x.detach() for x in operands(61, 61)]
    exact = layer.attend(*(x.bfloat16().double() for x in qkv), kernel="dense")
    found = layer.bfloat16().attend(*(x.bfloat16() for x in qkv), kernel="covered")
    torch.testing.assert_close(found.double(), exact, atol=2e-2, rtol=2e-2)


def taken(length, batch=1, tokens=None, **options):
    """The kernel that `auto` takes."""
    layer = build("bigbird", **options)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(batch, 4, length, 8)
    return next(name for name, reason in layer.explain(x, x, x, tokens, tokens) if reason is None)


def documents(length, count, batch=1, valid=None):
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    return Tokens.of(valid, None, (torch.arange(length) * count // length).expand(batch, length))


@pytest.mark.parametrize("causal", [True, False])
def test_where_it_is_taken(causal):
    """Links to most blocks, or documents hardly longer than what is linked; elsewhere links are gathered."""
    assert taken(1259, causal=causal, block=32, random=64) == "covered"
    assert taken(2048, causal=causal, random=64) == "covered"
    assert taken(4096, tokens=documents(4096, 24), causal=causal) == "covered"
    assert taken(2048, tokens=documents(2048, 48), causal=causal, block=16) == "covered", "of three blocks each"
    assert taken(4096, tokens=documents(4096, 24), causal=causal, block=16) == "blocks", "of eleven blocks each"
    assert taken(4096, causal=causal) == "blocks"
    assert taken(4096, tokens=documents(4096, 2), causal=causal) == "blocks"
    assert taken(316, tokens=documents(316, 24), causal=causal) == "short"


def test_documents_much_shorter_than_a_block_need_no_definition():
    """Filled up to whole blocks they would be mostly empty, and tiles by the definition cost several times as much."""
    left = torch.arange(1259) >= torch.arange(0, 600, 100)[:, None]
    tokens = documents(1259, 100, 6, left)
    assert taken(1259, 6, tokens, block=64, causal=True) == "covered"


def test_a_table_of_many_blocks_is_refused_by_name():
    layer, (q, k, v) = build("bigbird", block=2), operands(1500, 1500, batch=1)
    with pytest.raises(zoo.Unsupported, match="covered: too many blocks of 2 for a table, in documents of 1 lengths"):
        layer.attend(q, k, v, kernel="covered")
