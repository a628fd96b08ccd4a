"""The execution core against its definition: partial, merge, tiles with every kind of keys, learned biases."""

import itertools
import math
import mmap
import re
from pathlib import Path

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.ops.softmax import fused as fused_module
from attention_zoo.ops.softmax import tiles as tiles_module
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.ops.softmax.pages import LEAST, PAGE, large_pages
from attention_zoo.ops.softmax.partial import LOG2E, Asked, Scratch, Sums, fold, partial, partial_backward
from attention_zoo.ops.softmax.parts import Part, blocks_in
from attention_zoo.ops.softmax.tiles import Tile, run_tiles

SCALE = 0.3


def operands(L=9, S=11, H=4, K=2, B=2, D=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, n, D, generator=g, dtype=dtype).requires_grad_() for h, n in ((H, L), (K, S), (K, S))]


def random_bias(*shape, seed=1, seen=0.7):
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape, generator=g, dtype=torch.float64)
    return bias.masked_fill(torch.rand(shape, generator=g) > seen, -torch.inf)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def equal_with_gradients(got, want, inputs):
    close(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=want.dtype)
    for a, b in zip(torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, inputs, weight)):
        close(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 1, 11), (2, 1, 9, 11), (1, 4, 9, 11), (2, 4, 9, 11)])
def test_partial_is_dense_and_reports_the_log_sum_exp(shape):
    q, k, v = operands()
    bias = random_bias(*shape)
    bias[..., -1, :] = -torch.inf  # a row (or all) that sees nothing
    out, lse = partial(q.detach(), k.detach(), v.detach(), bias, scale=SCALE)
    close(out, dense(q, k, v, bias, scale=SCALE).detach())
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * SCALE + bias
    close(lse, scores.logsumexp(-1, keepdim=True).detach())


@pytest.mark.parametrize("every", [None, 1, 2])
def test_two_parts_merge_into_the_whole_forward_and_backward(every):
    """Also where every row, or every second, is known to be mild."""
    q, k, v = operands()
    mild = False if every is None else (torch.arange(9) % every == 0)[:, None].expand(2, 4, 9, 1)
    bias = random_bias(2, 4, 9, 11)
    bias[0, 0, 3, :6] = -torch.inf  # sees only the second part
    bias[1, 2, 4] = -torch.inf  # sees nothing at all
    want = dense(q, k, v, bias, scale=SCALE)
    a, b = slice(0, 6), slice(6, 11)
    with torch.no_grad():
        sums = Sums(q, Scratch(), mild)
        for s in (a, b):
            keys, values = (x[:, :, s].flatten(0, 1) for x in (k, v))
            sums.add(fold(q, 2), keys, values, bias[..., s], scale=SCALE, shape=(2, 4, 9))
        out, lse = sums.end()
        close(out, want)
        grad = torch.randn_like(out)
        down = -(grad * out).sum(-1, keepdim=True)
        shift = -LOG2E * lse.masked_fill(lse == -torch.inf, torch.inf)
        got = [torch.zeros_like(x) for x in (q, k, v)]
        asked = Asked(*(fold(x, 2) for x in (grad, q, down, shift)))
        for s in (a, b):
            keys = [x[:, :, s].flatten(0, 1) for x in (k, v)]
            into = (fold(got[0], 2), *(x.view(4, 11, 8)[:, s] for x in got[1:]))
            partial_backward(asked, *keys, bias[..., s], scale=SCALE, into=into, shape=(2, 4, 9))
    for mine, want_gradient in zip(got, torch.autograd.grad(want, (q, k, v), grad)):
        close(mine, want_gradient)


def test_partial_with_no_keys_or_no_queries_sees_nothing():
    q, k, v = (x.detach() for x in operands())
    out, lse = partial(q, k[:, :, :0], v[:, :, :0], scale=SCALE)
    assert not out.any()
    assert (lse == -torch.inf).all()
    none = q[:, :, :0]
    out, lse = partial(none, k, v, scale=SCALE)
    assert out.shape == (2, 4, 0, 8)
    asked, keys = Asked(*(fold(x, 2) for x in (out, none, lse, lse))), [x.flatten(0, 1) for x in (k, v)]
    into = tuple(torch.ones_like(x) for x in (asked.q, *keys))
    partial_backward(asked, *keys, scale=SCALE, into=into)
    assert all(g.all() for g in into)
    partial_backward(asked, *keys, scale=SCALE, into=into, fresh=True)
    assert all(not g.any() for g in into)


@pytest.mark.parametrize("kind", ["slice", "shared", "per_row", "per_head", "blocks_per_row_and_head"])
def test_every_kind_of_keys_equals_dense(kind):
    B, H, L, S = 2, 4, 8, 12
    q, k, v = operands(L=L, S=S)
    full = random_bias(B, H, L, S, seen=0.8)
    g = torch.Generator().manual_seed(3)
    used = torch.full((B, H, L, S), -torch.inf, dtype=torch.float64)
    tiles = []
    for start in (0, 4):
        rows = slice(start, start + 4)
        parts = []
        if kind == "slice":
            pieces = [slice(0, 5), slice(5, S)]
            for piece in pieces:
                used[:, :, rows, piece] = full[:, :, rows, piece]
                parts.append(Part(piece, lambda batch, rows=rows, piece=piece: full[batch, :, rows, piece]))
        elif kind == "shared":
            keys = torch.randperm(S, generator=g)[:6]
            used[:, :, rows, keys] = full[:, :, rows][..., keys]
            parts.append(Part(keys, lambda batch, rows=rows, keys=keys: full[batch, :, rows][..., keys]))
        elif kind == "per_row":
            keys = torch.stack([torch.randperm(S, generator=g)[:6] for _ in range(B)])
            bias = torch.stack([full[b, :, rows][..., keys[b]] for b in range(B)])
            for b in range(B):
                used[b, :, rows, keys[b]] = bias[b]
            parts.append(Part(keys, lambda batch, bias=bias: bias[batch]))
        else:
            block, batch = (1, 1) if kind == "per_head" else (3, B)
            count = S // block
            keys = torch.rand(batch, H, 2, count, generator=g).argsort(-1)[..., : 6 // block]
            columns = (keys[..., None] * block + torch.arange(block)).flatten(-2).expand(B, H, 2, 6)
            bias = torch.empty(B, H, 2, 2, 6, dtype=torch.float64)
            for b, h, group in itertools.product(range(B), range(H), range(2)):
                mine = slice(start + 2 * group, start + 2 * group + 2)
                bias[b, h, group] = full[b, h, mine][:, columns[b, h, group]]
                used[b, h, mine, columns[b, h, group]] = bias[b, h, group]
            parts.append(Part(blocks_in(k, H, keys, block), lambda batch, bias=bias: bias[batch], block))
        tiles.append(Tile(rows, parts))
    equal_with_gradients(run_tiles(q, k, v, tiles, scale=SCALE), dense(q, k, v, used, scale=SCALE), (q, k, v))


def test_a_step_asks_for_the_bias_of_its_own_batch_rows_alone(monkeypatch):
    monkeypatch.setitem(tiles_module.SCORES, "cpu", 2 * 2 * 8 * 8)  # two batch rows of two heads at a time
    q, k, v = operands(B=5, H=2, L=8, S=8)
    full, asked = random_bias(5, 1, 8, 8, seen=0.7), []

    def bias(batch):
        asked.append(range(5)[batch])
        return full[batch]

    got = run_tiles(q, k, v, [Tile(slice(0, 8), [Part(slice(0, 8), bias)])], scale=SCALE)
    equal_with_gradients(got, dense(q, k, v, full, scale=SCALE), (q, k, v))
    assert asked == [range(2), range(2, 4), range(4, 5)] * 2


def test_a_learned_bias_gets_its_gradient():
    q, k, v = operands(L=6, S=6)
    slope = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs().double()

    def bias(rows=slice(None), keys=slice(None)):
        return (-slope[:, None, None] * distance[rows, keys])[None].masked_fill(distance[rows, keys] > 3, -torch.inf)

    tiles = [
        Tile(slice(a, a + 3), [Part(slice(b, b + 3), lambda batch, a=a, b=b: bias(slice(a, a + 3), slice(b, b + 3)))
                               for b in (0, 3)])
        for a in (0, 3)
    ]  # fmt: skip
    got = run_tiles(q, k, v, tiles, scale=SCALE, learned=(slope,))
    equal_with_gradients(got, dense(q, k, v, bias(), scale=SCALE), (q, k, v, slope))


def test_rows_in_no_tile_yield_zeros_and_no_gradient():
    q, k, v = operands()
    out = run_tiles(q, k, v, [Tile(slice(0, 4), [Part(slice(0, 11), lambda batch: None)])], scale=SCALE)
    assert not out[:, :, 4:].any()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert not dq[:, :, 4:].any()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("longformer", {"kernel": "banded"}, "no second derivatives; kernel=dense"),
        ("longformer", {"kernel": "sdpa"}, "is not implemented"),  # torch's own words
        ("transformer_xl", {}, "no second derivatives; kernel=dense"),
        ("reformer", {}, "no second derivatives; kernel=dense"),
        ("bigbird", {"kernel": "blocks"}, "no second derivatives; kernel=dense"),
        ("bigbird", {"kernel": "short"}, "is not implemented"),
    ],
)
def test_a_second_derivative_is_refused(name, options, said):
    layer = zoo.build(name, dim=8, heads=1, **options)
    x = torch.randn(1, 5, 8, requires_grad=True)
    y = x + layer(x).hidden  # the sum is what torch's own once_differentiable does not see through
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(dx.sum(), x)


def test_half_precision_is_summed_in_float32():
    q, k, v = operands(L=64, S=64, dtype=torch.float32)
    want = dense(q.double(), k.double(), v.double(), scale=SCALE)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    got = run_tiles(*half, [Tile(slice(0, 64), [Part(slice(0, 64), lambda batch: None)])], scale=SCALE)
    naive = dense(*half, scale=SCALE)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2 * (naive - want).abs().max()


@pytest.mark.parametrize("biased", [False, True])
def test_half_precision_that_trains_goes_through_float32_where_the_processor_is_slow(monkeypatch, biased):
    """By its instructions, its units and the size of a head; forward alone stays, and values are the definition's."""
    q, k, v = operands(L=64, S=64, dtype=torch.float32)
    bias = torch.randn(1, 1, 64, 64) if biased else None
    want = dense(*(x.double() for x in (q, k, v)), None if bias is None else bias.double(), scale=SCALE)
    given = []
    right = torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, **more):
        given.append((q.dtype, None if more["attn_mask"] is None else more["attn_mask"].dtype))
        return right(q, k, v, **more)

    monkeypatch.setattr(fused_module.F, "scaled_dot_product_attention", seen)
    for capability, units, small, grad, expected in (
        ("AVX2", True, 0, True, torch.float32), ("AVX2", False, 0, False, torch.bfloat16),
        ("AVX512", False, 0, True, torch.float32), ("AVX512", False, 0, False, torch.bfloat16),
        ("AVX512", True, 0, True, torch.bfloat16), ("AVX512", True, q[0, 0].numel(), True, torch.float32),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda units=units: units)
        monkeypatch.setattr(fused_module, "SMALL", small)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        half = [x.detach().bfloat16().requires_grad_(grad) for x in (q, k, v)]
        got = fused_module.fused(*half, None if bias is None else bias.bfloat16(), scale=SCALE)
        assert given.pop() == (expected, expected if biased else None)
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() <= 0.03 * want.abs().max()
        if grad:
            assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(got.sum(), half))


@pytest.mark.parametrize("name", ["longformer", "bigbird", "transformer_xl", "reformer"])
def test_autocast_rounds_projections_but_not_the_sums_inside(name):
    options = {"resample": False} if name == "reformer" else {}
    torch.manual_seed(0)
    layer = zoo.build(name, dim=64, heads=2, **options)
    x = torch.randn(1, 700, 64, requires_grad=True)
    want = layer(x)
    weight = torch.randn_like(want.hidden)
    (want_grad,) = torch.autograd.grad((want.hidden * weight).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, choices=want.choices)
        (grad,) = torch.autograd.grad((got.hidden.float() * weight).sum(), x)
    assert got.hidden.dtype == torch.bfloat16
    assert (got.hidden - want.hidden).norm() < 0.005 * want.hidden.norm()
    assert (grad - want_grad).norm() < 0.008 * want_grad.norm()


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_channels_need_not_be_neighbours_in_memory(name):
    """No kernel may read them as if they were: rotated heads of width two are not, nor may a caller's be."""
    layer = zoo.build(name, dim=16, heads=4).double()
    tokens = zoo.Tokens.of(torch.arange(19)[None].expand(2, -1) > 2)
    leaves = operands(L=19, S=19)
    for kernel, reason in layer.explain(*leaves, tokens, tokens):
        if reason is None:
            spread = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in leaves]
            assert all(x.stride(-1) != 1 for x in spread)
            want = layer.attend(*leaves, tokens, tokens, kernel="dense")
            got = layer.attend(*spread, tokens, tokens, kernel=kernel)
            equal_with_gradients(got[:, :, 3:], want[:, :, 3:], leaves)


def hinted(x) -> bool:
    """Whether the kernel was asked for large pages in the middle of this tensor."""
    middle, found = x.data_ptr() + x.numel() * x.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(match[1], 16) <= middle < int(match[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the hint is Linux's")
def test_large_results_lie_on_large_pages():
    size = 17 * PAGE // 4 + 3
    fresh = torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32)  # an allocator may hand out advised memory
    assert not hinted(fresh)
    assert hinted(large_pages(fresh))
    assert hinted(large_pages(torch.empty(size)))
    for start in (0, 1, 77):  # only what is whole pages of its own
        whole = torch.arange(size, dtype=torch.float32)
        assert large_pages(whole[start:]).data_ptr() == whole[start:].data_ptr()
        assert torch.equal(whole, torch.arange(size, dtype=torch.float32))
    for shape in ((0,), (3,), (LEAST // 4 - 1,)):
        assert large_pages(torch.ones(shape)).sum() == math.prod(shape)
