"""What a layer asks of the host on the path of CUDA: counted on CPU tensors, with the launches left out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from count_reads import Count, layouts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention

import attention_zoo as zoo
from attention_zoo.contract import Attention
from attention_zoo.layout import host, kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.lsh import chunks, hashing
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.softmax import tiles


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Kernels are chosen as on CUDA, and none of them runs."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        patch.setattr(kernel, "TRITON_DEVICES", ("cuda", "cpu"))
        patch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
        patch.setattr(JITFunction, "run", lambda *_, **__: None)
        # facts are held by kernels already: what they say is replaced, not they
        patch.setattr(facts.on_cuda, "__code__", (lambda call: None).__code__)
        patch.setattr(host.on_host, "__code__", (lambda device: False).__code__)
        patch.setattr(flex_attention, "flex_attention", _flex)
        patch.setattr(F, "scaled_dot_product_attention", _fused)
        patch.setattr(tiles, "SCORES", {})  # so many at once as a GPU holds
        patch.setattr(chunks, "_SCORES", {})
        patch.setattr(chunks, "_SLOTS", {})
        patch.setattr(chunks, "_ROUNDS", {})
        yield


class _Launched(torch.autograd.Function):
    """Of one kernel forward, one backward, and what torch computes of the output between them."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> tuple[Tensor, Tensor]:
        ctx.operands, (q, _, v, *_) = operands, operands
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.zeros_like, ctx.operands))


class _Beside(NamedTuple):
    """As of FlexAttention."""

    lse: Tensor


def _flex(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Callable[..., Tensor] | None, **_: Any
) -> tuple[Tensor, _Beside]:
    """Of tables that score by themselves, too, which learn."""
    tables = () if score_mod is None else inspect.getclosurevars(score_mod).nonlocals.get("tables", ())
    out, lse = _Launched.apply(q, k, v, *(each for each in tables if each is not None))
    return out, _Beside(lse)


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """As on CUDA, where no engine takes groups of heads in float32: keys are repeated."""
    if options.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return _Launched.apply(q, k, v)[0]


def counted(make: Callable[[], Tensor]) -> tuple[int, int]:
    """Operators of the forward and of the backward of what `make` gives, but for a number that the host draws."""
    with Count() as forward, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "drawn_number", lambda: 7)
        out = make()
    with Count() as backward:
        out.sum().backward()
    return forward.operators, backward.operators


def added(
    layer: Attention, length: int = 300, source: zoo.Source | None = None
) -> Iterator[tuple[str, tuple[int, int] | zoo.Unsupported]]:
    """What a layer adds to its projections in each layout, forward and backward; or why it takes none such."""
    x = torch.randn(2, length, layer.dim, requires_grad=True)
    widths = layer.dim, layer.heads * layer.head_width

    def count(make: Callable[[], Tensor]) -> tuple[int, int]:
        for each in (x, *layer.parameters()):
            each.grad = None
        return counted(make)

    for what, given in layouts(2, length):
        layout = Layout.plain(2, length) if given is None else Layout.of(zoo.Tokens.of(*given))
        try:
            layer(x, layout, source=source).hidden.sum().backward()  # plans are made
        except zoo.Unsupported as refused:
            yield what, refused
            continue
        used = [
            module
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear) and module.in_features in widths
            if "global" in what or "global" not in path
        ]
        # as many of the same width, so that one operator takes their outputs
        like = [nn.Linear(layer.dim, layer.dim, bias=project.bias is not None) for project in used]
        alone = count(lambda like=like: torch.stack([project(x) for project in like]).sum())
        found = count(lambda layout=layout: layer(x, layout, source=source).hidden)
        yield what, (found[0] - alone[0], found[1] - alone[1])
