"""Keys that every row sees besides its tile's: one softmax with those, outputs and gradients."""

import pytest
import torch
from count_reads import Count

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.ops.pattern import few
from attention_zoo.ops.softmax.common import Common
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.ops.softmax.parts import Part
from attention_zoo.ops.softmax.tiles import Rows, Tile, run_tiles

SCALE = 0.3


def operands(B, H, K, L, S, size=1.0):
    torch.manual_seed(0)
    shapes = (B, L, H, 8), (B, S, K, 8), (B, S, K, 8)
    return [(torch.randn(*shape).double() * size).transpose(1, 2).requires_grad_() for shape in shapes]


def equal_with_gradients(got, want, inputs):
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [1.0, 30.0])  # scores above 100
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("count", "kv_heads"), [(1, 4), (3, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("length", [1, 7, 600])  # more than are taken at once
def test_equal_the_definition(length, count, kv_heads, with_sink, size):
    B, H, L, S = 2, 4, length, length + 3
    q, k, v = operands(B, H, kv_heads, L, S, size)
    sink = torch.randn(H).double().requires_grad_() if with_sink else None
    columns = torch.stack([torch.randperm(S)[:count] for _ in range(B)])
    bias = torch.randn(B, H, L, count).double().masked_fill(torch.rand(B, 1, L, count) > 0.7, -torch.inf)
    used, tiles = torch.full((B, H, L, S), -torch.inf).double(), []
    for rows in [slice(0, L // 2), slice(L // 2, L)][L < 2 :]:
        keys = slice(rows.start, rows.stop + 2)
        own = torch.zeros(B, 1, L, S).double()
        own.scatter_(3, columns[:, None, None].expand(-1, -1, L, -1), -torch.inf)  # each counts once
        own = own[:, :, rows, keys]
        used[:, :, rows, keys] = own.expand(-1, H, -1, -1)
        tiles.append(Tile(rows, [Part(keys, lambda batch, own=own: own[batch])]))
    used.scatter_(3, columns[:, None, None].expand(-1, H, L, -1), bias)
    found = run_tiles(q, k, v, tiles, scale=SCALE, sink=sink, common=Common(columns, bias))
    inputs = [x for x in (q, k, v, sink) if x is not None]
    equal_with_gradients(found, dense(q, k, v, used, scale=SCALE, sink=sink), inputs)


def test_rows_that_another_tile_decides_leave_them_alone():
    q, k, v = operands(1, 2, 2, 6, 6)
    columns, bias = torch.tensor([[4]]), torch.zeros(1, 1, 6, 1).double()
    used = torch.full((1, 1, 6, 6), -torch.inf).double()
    used[..., 4], used[..., 2, :] = 0, 0
    tiles = [
        Tile(slice(0, 6), []),
        Tile(Rows(torch.tensor([[2]]), torch.tensor([[True]])), [Part(slice(0, 6), lambda batch: None)]),
    ]
    found = run_tiles(q, k, v, tiles, scale=SCALE, common=Common(columns, bias))
    equal_with_gradients(found, dense(q, k, v, used, scale=SCALE), (q, k, v))


OPTIONS = [
    {"causal": False, "dilation": [1, 2, 3, 3]},
    {"causal": True, "dilation": 2},
    {"causal": True, "sinks": 2, "positions": "rotary"},
    {"causal": True, "sinks": 2, "dilation": [2, 2, 1, 1], "kv_heads": 2},
    {"causal": False, "kv_heads": 2, "sink_logit": True, "positions": "alibi"},
    {"causal": True, "sinks": 3, "sink_positions": "cache", "positions": "alibi"},
]


def tokens(kind, L):
    valid, flags = torch.ones(3, L, dtype=torch.bool), torch.zeros(3, L, dtype=torch.bool)
    if kind == "left, holes":
        valid[0, :7], valid[1, 3::4] = False, False
    document = torch.arange(L).div(29, rounding_mode="floor").expand(3, L) if kind == "packed" else None
    flags[0, 8], flags[1, :3], flags[2, L - 1] = True, True, kind != "plain"
    return Tokens.of(valid, flags & valid, document)


@pytest.mark.parametrize("kernel", ["auto", "tiles"])
@pytest.mark.parametrize("kind", ["plain", "left, holes", "packed"])
@pytest.mark.parametrize("projections", ["shared", "separate"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_equals_the_definition(options, projections, kind, kernel):
    torch.manual_seed(0)
    options = {"window": 9, "global_projections": projections, **options}
    layer = zoo.build("longformer", dim=24, heads=4, head_width=24, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    x, found = torch.randn(3, 61, 24, dtype=torch.float64), []
    layer.tile = 8
    for layer.kernel in (kernel, "dense"):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        out = layer(given, tokens(kind, 61)).hidden
        out.pow(2).sum().backward()
        found.append([out.detach(), given.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_band_takes_few_more_operators_for_one(monkeypatch):
    """Less than half of what it takes as a part of each tile."""
    layer = zoo.build("longformer", dim=64, heads=2, window=64, causal=False, kernel="banded", bias=False)
    flags, x = torch.zeros(1, 1024, dtype=torch.bool), torch.randn(1, 1024, 64, requires_grad=True)

    def operators():
        with Count() as counted:
            layer(x, Tokens.of(torch.ones_like(flags), flags)).hidden.sum().backward()
        return counted.operators

    plain = operators()
    flags[:, 500] = True
    together = operators()
    monkeypatch.setattr(few, "MOST", 0)
    by_tile = operators()
    assert 2 * (together - plain) <= by_tile - plain, (plain, together, by_tile)
