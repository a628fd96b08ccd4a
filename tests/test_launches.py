"""What a layer asks of the host on the path of CUDA, counted on CPU tensors with the launches left out."""

from __future__ import annotations

import pytest
import torch
from count_reads import Count, layouts
from torch import nn

import attention_zoo as zoo
from attention_zoo.layout import kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.pattern import facts, flex

pytest.importorskip("triton", reason="triton is not installed")

FORWARD, BACKWARD = 60, 40
"""Operators that a layer adds to its projections, at most, once its layout is planned."""
KERNELS = {
    "bigbird": "triton",
    "full": "sdpa",
    "longformer": "flex",
    "reformer": "triton",
    "transformer_xl": "triton",
}
HASHED_TWICE = 20
"""More of them where documents have different numbers of buckets, each of which is hashed by itself."""


@pytest.fixture(autouse=True)
def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(facts, "on_cuda", lambda call: None)
    monkeypatch.setattr(flex, "attend", lambda q, k, v, *_: (q + (k.sum() + v.sum()) * 0, q.new_zeros(q.shape[:3])))


def counted(make) -> tuple[int, int]:
    """Operators of the forward and of the backward of what `make` gives."""
    with Count() as forward:
        out = make()
    with Count() as backward:
        out.sum().backward()
    return forward.operators, backward.operators


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_adds_few_operators_to_its_projections(name: str) -> None:
    layer = zoo.build(name, dim=64, heads=4, kernel=KERNELS[name])
    x = torch.randn(2, 300, 64, requires_grad=True)
    used = [module for path, module in layer.named_modules() if isinstance(module, nn.Linear) and "global" not in path]
    alone = counted(lambda: torch.stack([project(x) for project in used]).sum())
    for what, given in layouts(2, 300):
        if "global" in what:
            continue
        layout = Layout.plain(2, 300) if given is None else Layout.of(zoo.Tokens.of(*given))
        try:
            layer(x, layout).hidden.sum().backward()  # plans are made
        except zoo.Unsupported:
            continue  # holes
        found = counted(lambda layout=layout: layer(x, layout).hidden)
        more = HASHED_TWICE if name == "reformer" else 0
        assert found[0] - alone[0] <= FORWARD + more, f"{what}: {found[0]} forward, projections alone {alone[0]}"
        assert found[1] - alone[1] <= BACKWARD, f"{what}: {found[1]} backward, projections alone {alone[1]}"
