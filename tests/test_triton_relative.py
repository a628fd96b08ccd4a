"""Relative attention by Triton against the definition by plain autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_device import close, on_triton

import attention_zoo as zoo
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.testing.case import Case

__all__ = ["on_triton"]
pytestmark = [
    pytest.mark.usefixtures("on_triton"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # older interpreters' own
]


def definition(q, k, v, k_own, v_own, r, u, w, first, own, scale) -> Tensor:
    """Every pair; the streams of keys and values are told apart by an exact zero."""
    L, S = q.shape[2], k.shape[2]
    column, key = torch.arange(S - L, S)[:, None], torch.arange(S)
    seen = ((key >= first[..., None]) & (key <= column))[:, None]
    inside = (key >= own[..., None])[:, None]
    distance = (column - key).clamp(0, len(r) - 1)
    content = (q + u[:, None]) @ k.transpose(-1, -2)
    content = content + inside * ((q + u[:, None]) @ (k_own - k_own.detach()).transpose(-1, -2))
    place = torch.einsum("bhld,lshd->bhls", q + w[:, None], r[distance])
    scores = ((content + place) * scale).masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind | ~seen, 0)
    return weights @ v + (weights * inside) @ (v_own - v_own.detach())


@pytest.mark.parametrize(
    ("B", "H", "L", "M", "D", "dtype", "reach"),
    [
        (1, 1, 1, 20, 16, torch.float32, 5),
        (2, 1, 37, 11, 6, torch.float32, 5),
        (1, 2, 16, 0, 16, torch.float32, 5),
        (1, 1, 19, 4, 8, torch.float16, 5),
        (1, 1, 37, 48, 16, torch.float32, 60),  # with tiles that are seen whole
    ],
)
def test_equals_the_definition(monkeypatch, on_triton, B, H, L, M, D, dtype, reach) -> None:
    from attention_zoo.ops.relative import triton

    monkeypatch.setattr(triton, "TILE", 16)
    monkeypatch.setattr(triton, "OFFSETS", 0 if B > 1 else 2**31)  # also with offsets of 64 bits
    S, segment = L + M, 8
    column = torch.arange(M, S).expand(B, -1).clone()
    own = (column - M) // segment * segment + M
    first = (own - reach).clamp(min=0)
    if B > 1:  # a row whose first third is padding
        third = L // 3
        first[1], own[1] = first[1].clamp(min=M + third), own[1].clamp(min=M + third)
        first[1, :third] = own[1, :third] = column[1, :third] + 1
    distances = int((column - first).max()) + 3
    shapes = [(B, H, L, D), *[(B, H, S, D)] * 4, (distances, H, D), (H, D), (H, D)]
    given = [0.7 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    given[3], given[4] = given[1].clone(), given[2].clone()
    grad = torch.randn(shapes[0], dtype=torch.float64)

    exact = [x.to(dtype).double().requires_grad_() for x in given]
    want = definition(*exact, first, own, 0.3)
    wants = torch.autograd.grad(want, exact, grad)
    mine = [x.to(on_triton, dtype).requires_grad_() for x in given]
    starts = triton.Starts(first.to(on_triton), own.to(on_triton), S)
    got = triton.relative_attention(RelativeOperands(*mine), starts, scale=0.3)
    close(got, want, "output")
    gots = torch.autograd.grad(got, mine, grad.to(got))
    for name, a, b in zip(("q", "k", "v", "k_own", "v_own", "r", "u", "w"), gots, wants):
        close(a, b, f"gradient of {name}")


@pytest.mark.parametrize(
    ("options", "layouts", "other"),
    [
        ({}, ("padded left", "documents"), "shift"),
        ({"same_length": True}, ("padded left", "documents"), "shift"),
        # moved together: holes, and what stands between blank hidden states and the first token
        ({}, ("holes",), "gather"),
        ({"same_length": True}, ("holes", "documents and holes"), "gather"),
        ({"initial_memory": "zeros"}, ("holes", "padded left"), "gather"),
    ],
    ids=str,
)
def test_the_layer_equals_itself_with_another_kernel(monkeypatch, on_triton, options, layouts, other) -> None:
    from attention_zoo.ops.relative import triton

    monkeypatch.setattr(triton, "TILE", 16)
    case = Case.of("transformer_xl", **options)
    layer = case.build(dtype=torch.float32).to(on_triton)
    known = dict(case.layouts(21))
    known["documents and holes"] = zoo.Tokens.of(known["holes"].valid, document=known["documents"].document)
    for layout in layouts:
        tokens = known[layout]
        tokens = zoo.Tokens(*(field.to(on_triton) for field in tokens))
        x = case.data(3, 21, dtype=torch.float32).to(on_triton).requires_grad_()
        found = {}
        for kernel in ("triton", other):
            layer.kernel = kernel
            out = layer(x, tokens).hidden[tokens.valid]
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found[kernel] = (out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]))
        for number, (a, b) in enumerate(zip(found["triton"], found[other])):
            close(a, b, f"{layout}, result {number}")


def test_it_refuses_with_a_reason(on_triton) -> None:
    layer = zoo.build("transformer_xl", dim=16, heads=1, kernel="triton").double().to(on_triton)
    with pytest.raises(zoo.Unsupported, match=r"kernel=triton is not.*triton: its products are not exact in float64"):
        layer(torch.zeros(1, 3, 16, dtype=torch.float64, device=on_triton))
    valid = torch.tensor([[True, False, True]], device=on_triton)
    tokens = zoo.Tokens.of(valid)._replace(position=torch.tensor([[0, 0, 5]], device=on_triton))
    with pytest.raises(zoo.Unsupported, match="columns are not positions"):
        layer.float()(torch.zeros(1, 3, 16, device=on_triton), tokens)
    wide = zoo.build("transformer_xl", dim=256, heads=1, kernel="triton").to(on_triton)
    with pytest.raises(zoo.Unsupported, match="width 256"):
        wide(torch.zeros(1, 3, 256, device=on_triton))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_it_is_refused_without_cuda(monkeypatch) -> None:
    from attention_zoo.layout import kernel

    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda",))
    for name, length in (("transformer_xl", 3), ("reformer", 3), ("bigbird", 3)):
        layer = zoo.build(name, dim=16, heads=1, kernel="triton")
        with pytest.raises(zoo.Unsupported, match="it runs on CUDA, not on cpu"):
            layer(torch.zeros(1, length, 16))
