"""Global rows by products, as on a GPU, where fused attention knows no sink or would round a bias: the definition."""

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import globals as module
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import dense_global_rows, global_rows
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.ops.softmax.rows import attend_rows

SCALE = 0.3


@pytest.mark.parametrize("size", [1.0, 30.0])  # scores above 100
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 4, 1), (4, 2, 5), (3, 1, 2)])
def test_rows_equal_the_definition(heads, kv_heads, rows, with_sink, size):
    torch.manual_seed(0)
    shapes = (2, heads, rows, 8), (2, kv_heads, 13, 8), (2, kv_heads, 13, 8)
    q, k, v = ((torch.randn(*shape).double() * size).requires_grad_() for shape in shapes)
    sink = (torch.randn(heads).double() * size).requires_grad_() if with_sink else None
    bias = torch.randn(2, heads, rows, 13).double()
    bias = bias.masked_fill(torch.rand(2, 1, rows, 13) > 0.6, -torch.inf)
    bias[..., 3] = 0  # each row sees a key
    inputs = [x for x in (q, k, v, sink) if x is not None]
    weight = torch.randn(2, heads, rows, 8).double()
    found = []
    for out in (attend_rows(q, k, v, bias, scale=SCALE, sink=sink), dense(q, k, v, bias, scale=SCALE, sink=sink)):
        found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 500, 500))
    bias, half = torch.randn(1, 2, 3, 500), [x.bfloat16() for x in (q, k, v)]
    want = dense(q.double(), k.double(), v.double(), bias, scale=SCALE)
    got, plain = (run(*half, bias, scale=SCALE) for run in (attend_rows, dense))
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 1.5 * (plain - want).abs().max()


def test_a_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 1, 3, 8).requires_grad_() for _ in range(3))
    out = attend_rows(q, k, v, torch.zeros(1, 1, 3, 3), scale=SCALE)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("most", [1024, 2])  # rows at once
@pytest.mark.parametrize("options", [{}, {"positions": "alibi"}, {"sink_logit": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_of_a_layout_they_are_those_of_the_definition(causal, options, most, monkeypatch):
    """Packed and padded, with rows that have fewer global tokens than others; whatever fillers give."""
    monkeypatch.setattr(module, "FUSED_ROWS", most)
    torch.manual_seed(0)
    layer = zoo.build("longformer", dim=16, heads=2, window=3, causal=causal, **options).double()
    valid, flags = torch.ones(2, 23, dtype=torch.bool), torch.zeros(2, 23, dtype=torch.bool)
    valid[0, :4], flags[0, [5, 17, 22]], flags[1, 9] = False, True, True
    tokens = Layout.of(Tokens.of(valid, flags, (torch.arange(23) >= 12).long().expand(2, -1)))
    q, k, v = (torch.randn(2, 2, 23, 8).double().requires_grad_() for _ in range(3))
    call = PatternCall(layer, q, k, v, tokens, tokens, SCALE, sink=layer.sink)
    asked = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()[:, None, :, None]
    found = []
    for rows in (global_rows(call, in_one=True), dense_global_rows(call)):
        rows = rows.masked_fill(~asked, 0)
        found.append([rows, *torch.autograd.grad(rows.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", range(30))
def test_columns_are_those_of_each_row_with_fillers_behind(seed):
    torch.manual_seed(seed)
    B, L = seed % 4, int(torch.randint(0, 7, ()))
    valid, flags = torch.rand(B, L) < 0.8, torch.rand(B, L) < (0.1, 0.5, 0.9)[seed % 3]
    columns, chosen = module.global_columns(Layout.of(Tokens.of(valid, flags & valid)))
    want = [row.nonzero().flatten().tolist() for row in flags & valid]
    count = max(map(len, want), default=0)
    assert columns.shape == chosen.valid.shape == (B, count)
    for row, mine in enumerate(want):
        assert columns[row, : len(mine)].tolist() == mine
        assert chosen.valid[row].tolist() == [True] * len(mine) + [False] * (count - len(mine))
