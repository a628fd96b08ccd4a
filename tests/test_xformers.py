"""xformers' local masks against the definition, by their own `materialize()`; the kernel needs a GPU (test_cuda.py)."""

from __future__ import annotations

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.layout.kernel import unmet
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern import xformers as ours


def call_of(layer, length: int, columns: int | None = None, tokens: zoo.Tokens | None = None):
    columns = columns or length
    q, k = torch.zeros(1, layer.heads, length, 16), torch.zeros(1, layer.heads, columns, 16)
    return layer._call(q, k, k, None, tokens, None)


def refusals(call) -> str:
    """All reasons but that this machine has no GPU."""
    return "; ".join(unmet((facts.is_plain_band, facts.is_uniform), call.pattern) or unmet(ours.FITS, call))


@pytest.mark.filterwarnings("ignore")  # xformers warns of everything that a CPU machine lacks
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "columns"), [(1, 1), (7, 7), (29, 29), (5, 29)])
def test_the_mask_is_the_definition(causal: bool, length: int, columns: int) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    layer = zoo.build("longformer", dim=16, heads=1, window=3, causal=causal)
    call = call_of(layer, length, columns)
    want = layer.full_bias(call.queries, call.keys)[0, 0]
    got = ours.local_mask(call).materialize((length, columns), dtype=torch.float32)
    torch.testing.assert_close(got, want)


LAYOUTS = {
    "documents": ([29, 29], True),
    "documents and padding before": ([29, 17], True),
    "padding before": ([29, 11], False),
}


def layout(name: str) -> zoo.Tokens:
    kept, packed = LAYOUTS[name]
    valid = torch.arange(29) >= 29 - torch.tensor(kept)[:, None]
    document = torch.arange(29) // torch.tensor([[9], [13]]) if packed else None
    return zoo.Tokens.of(valid, None, document)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_causal_documents_are_one_row_without_padding(monkeypatch, name: str, kv_heads: int) -> None:
    """All but xformers' own kernel: their mask as a matrix, our packing, and gradients through both."""
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")

    def attention(q, k, v, attn_bias, scale):
        assert len(q) == 1
        grouped = q.ndim == 5
        q, k, v = (x.flatten(2, 3).transpose(1, 2) if grouped else x.transpose(1, 2) for x in (q, k, v))
        bias = attn_bias.materialize((q.shape[2], k.shape[2]), dtype=q.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
        return out.unflatten(2, (kv_heads, -1)) if grouped else out

    monkeypatch.setattr(ops, "memory_efficient_attention", attention)
    layer, tokens = zoo.build("longformer", dim=64, heads=4, window=3, kv_heads=kv_heads), layout(name)
    shapes = ((2, heads, 29, 16) for heads in (4, kv_heads, kv_heads))
    qkv = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    call = layer._call(*qkv, tokens, tokens, None)
    assert not refusals(call)
    found = []
    for out in (ours.XFORMERS.run(call), layer.attend(*qkv, tokens, tokens, kernel="dense")):
        out = out * tokens.valid[:, None, :, None]
        found.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_it_refuses_with_a_reason() -> None:
    def reason(length: int = 9, tokens: zoo.Tokens | None = None, **options) -> str:
        return refusals(call_of(zoo.build("longformer", dim=32, heads=2, **options), length, None, tokens))

    valid = torch.ones(1, 9, dtype=torch.bool)
    right = torch.arange(9)[None] < 6
    flags = torch.arange(9)[None] == 4
    assert not reason()
    assert not reason(tokens=zoo.Tokens.of(right))
    assert "two-sided" in reason(tokens=zoo.Tokens.of(right), causal=False)
    holes = torch.arange(9)[None] % 4 != 2
    assert not reason(tokens=zoo.Tokens.of(right.flip(1)))
    assert "holes" in reason(tokens=zoo.Tokens.of(holes))
    assert "global" in reason(tokens=zoo.Tokens.of(valid, flags))
    packed = zoo.Tokens.of(valid, None, (torch.arange(9) // 5)[None])
    assert not reason(tokens=packed)
    assert "other documents from a two-sided" in reason(tokens=packed, causal=False)
    assert "dilation" in reason(dilation=2)
    assert "position scheme" in reason(positions="alibi")
    assert "no band" in refusals(call_of(zoo.build("full", dim=32, heads=2), 9))
    with pytest.raises(zoo.Unsupported, match="xformers: it runs on CUDA, not on cpu"):
        zoo.build("longformer", dim=32, heads=2, kernel="xformers")(torch.zeros(1, 9, 32))
