"""What a layer asks of the host on the path of CUDA, counted on CPU tensors with the launches left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from count_reads import Count, layouts
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo.layout import kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts, flex

pytest.importorskip("triton", reason="triton is not installed")

FORWARD, BACKWARD = 60, 40
"""Operators that a layer adds to its projections, at most, once its layout is planned."""
KERNELS = {
    "adaptive_span": "flex",
    "bigbird": "triton",
    "full": "auto",
    "h_transformer_1d": None,
    "longformer": "flex",
    "memory_compressed": None,
    "reformer": "triton",
    "transformer_xl": "triton",
}
MORE = {"h_transformer_1d": (0, 20), "memory_compressed": (0, 10), "reformer": (10, 0)}
"""More than that, forward and backward: gradients of means level by level; a convolution of keys and values; documents
with different numbers of buckets among padding."""
SEGMENTS = {"block_recurrent": (250, 350), "compressive": (320, 750)}
"""Forward and backward, of two segments at most: these go over segments on the host, one after the other where states
are recurrent by definition."""


@pytest.fixture(autouse=True)
def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    # facts are held by kernels already: what they say is replaced, not they
    monkeypatch.setattr(facts.on_cuda, "__code__", (lambda call: None).__code__)
    monkeypatch.setattr(facts.on_cpu, "__code__", (lambda call: "it runs on CPU").__code__)
    monkeypatch.setattr(flex, "attend", lambda q, k, v, *_: (q + (k.sum() + v.sum()) * 0, q.new_zeros(q.shape[:3])))


def counted(make: Callable[[], Tensor]) -> tuple[int, int]:
    """Operators of the forward and of the backward of what `make` gives."""
    with Count() as forward:
        out = make()
    with Count() as backward:
        out.sum().backward()
    return forward.operators, backward.operators


def added(name: str, **options: object) -> Iterator[tuple[str, int, int]]:
    """What a layer adds to its projections in each layout that it takes, forward and backward."""
    layer = zoo.build(name, dim=64, heads=4, **options)
    x = torch.randn(2, 300, 64, requires_grad=True)

    def count(make: Callable[[], Tensor]) -> tuple[int, int]:
        for each in (x, *layer.parameters()):
            each.grad = None
        return counted(make)

    for what, given in layouts(2, 300):
        layout = Layout.plain(2, 300) if given is None else Layout.of(zoo.Tokens.of(*given))
        try:
            layer(x, layout).hidden.sum().backward()  # plans are made
        except zoo.Unsupported:
            continue  # holes, or global tokens
        used = [
            module
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear) and module.in_features == 64 and ("global" in what or "global" not in path)
        ]
        alone = count(lambda used=used: torch.stack([project(x) for project in used]).sum())
        found = count(lambda layout=layout: layer(x, layout).hidden)
        yield what, found[0] - alone[0], found[1] - alone[1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_adds_few_operators_to_its_projections(name: str) -> None:
    options = {} if KERNELS[name] is None else {"kernel": KERNELS[name]}
    more, layouts_run = MORE.get(name, (0, 0)), []
    for what, forward, backward in added(name, **options):
        layouts_run.append(what)
        assert forward <= FORWARD + more[0], f"{what}: {forward} forward"
        assert backward <= BACKWARD + more[1], f"{what}: {backward} backward"
    assert {"plain", "right padding", "left padding", "packed"} <= set(layouts_run)
    assert ("global" in layouts_run) == (name in ("bigbird", "full", "longformer"))


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_takes_a_bounded_number(name: str) -> None:
    for what, forward, backward in added(name):
        assert forward <= SEGMENTS[name][0], f"{what}: {forward} forward"
        assert backward <= SEGMENTS[name][1], f"{what}: {backward} backward"
