"""What a layer asks of the host on the path of CUDA, counted on CPU tensors with the launches left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from count_reads import Count, layouts
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo.layout import grid, kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.lsh import hashing
from attention_zoo.ops.pattern import facts, flex

pytest.importorskip("triton", reason="triton is not installed")

FORWARD, BACKWARD = 60, 40
"""Operators that a layer adds to its projections, at most, once its layout is planned."""
KERNELS = {
    "adaptive_span": "flex",
    "bigbird": "triton",
    "block_recurrent": "auto",
    "compressive": "triton",
    "full": "auto",
    "h_transformer_1d": None,
    "longformer": "flex",
    "memory_compressed": None,
    "reformer": "triton",
    "transformer_xl": "triton",
}
TURN = 38, 50
"""What each turn adds where states are recurrent by definition (block_recurrent)."""
TURNS = 20, 140
"""What all turns add together: views of all of them, a window of states, and gradients of weights."""
GLOBAL = 20, 20
"""What tokens of the model's own add to those that a caller marks, for the whole stack."""
SEGMENT = 30, 30
"""What a segment of memory_tokens adds to the two layers that it runs anew."""
HIERARCHICAL = 100, 200
"""Of a layer within segments and among summaries, at any length, with its share of the model around it."""


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
    monkeypatch.setattr(flex, "attend", flex_without_its_kernel)
    monkeypatch.setattr(grid, "copies_rows", lambda x: False)


class _Flex(torch.autograd.Function):
    """What is launched besides: forward a kernel, backward one, and delta."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        ctx.others = others
        return torch.empty_like(q), q.new_zeros(q.shape[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(grad), *map(torch.zeros_like, ctx.others)


def flex_without_its_kernel(
    q: Tensor, k: Tensor, v: Tensor, lists: object, functions: tuple[Callable[..., Tensor], ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Of tables that score by themselves, too, which learn."""
    tables = [] if functions[1] is None else inspect.getclosurevars(functions[1]).nonlocals.get("tables", ())
    return _Flex.apply(q, k, v, *(each for each in tables if each is not None))


def counted(make: Callable[[], Tensor]) -> tuple[int, int]:
    """Operators of the forward and of the backward of what `make` gives, but for a number that the host draws."""
    with Count() as forward, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "drawn_number", lambda: 7)
        out = make()
    with Count() as backward:
        out.sum().backward()
    return forward.operators, backward.operators


def added(
    name: str, length: int = 300, spans: tuple[int, ...] = (), **options: object
) -> Iterator[tuple[str, int, int]]:
    """What a layer adds to its projections in each layout that it takes, forward and backward.

    Args:
        spans: how far heads reach; as they begin.
    """
    layer = zoo.build(name, dim=64, heads=4, **options)
    if spans:
        with torch.no_grad():
            layer.span.copy_(torch.tensor(spans) / layer.limit)
    x = torch.randn(2, length, 64, requires_grad=True)

    def count(make: Callable[[], Tensor]) -> tuple[int, int]:
        for each in (x, *layer.parameters()):
            each.grad = None
        return counted(make)

    for what, given in layouts(2, length):
        layout = Layout.plain(2, length) if given is None else Layout.of(zoo.Tokens.of(*given))
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
    layouts_run = []
    for what, forward, backward in added(name, **options):
        layouts_run.append(what)
        assert forward <= FORWARD, f"{what}: {forward} forward"
        assert backward <= BACKWARD, f"{what}: {backward} backward"
    assert {"plain", "right padding", "left padding", "packed"} <= set(layouts_run)
    assert ("global" in layouts_run) == (name in ("bigbird", "full", "longformer"))


@pytest.mark.parametrize("length", [20, 300])
def test_heads_that_reach_differently_far_run_as_one(length: int) -> None:
    """Of few queries, too, which tiles would take one by one, head by head."""
    for what, forward, backward in added("adaptive_span", length, spans=(3, 40, 100, 250), limit=400):
        assert forward <= FORWARD, f"{what}: {forward} forward"
        assert backward <= BACKWARD, f"{what}: {backward} backward"


@pytest.mark.parametrize("length", [20, 9000])
@pytest.mark.parametrize("name", ["h_transformer_1d", "memory_compressed"])
def test_keys_made_of_tokens_take_no_more_at_any_length(name: str, length: int) -> None:
    for what, forward, backward in added(name, length):
        assert forward <= FORWARD, f"{what}: {forward} forward"
        assert backward <= BACKWARD, f"{what}: {backward} backward"


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("adaptive_span", {"positions": "rotary"}, 0),
        ("bigbird", {"positions": "rotary"}, 0),
        ("full", {"positions": "rotary"}, 0),
        ("full", {"positions": "alibi"}, 0),
        ("longformer", {"positions": "alibi"}, 0),
        ("longformer", {"positions": "rotary", "global_projections": "shared"}, 0),
        ("longformer", {"positions": "rotary"}, 0),
        ("block_recurrent", {"positions": "rotary"}, 0),
        ("block_recurrent", {"positions": "alibi"}, 0),
        ("adaptive_span", {"sink_logit": True}, 0),
        ("bigbird", {"causal": False}, 0),
        ("bigbird", {"sink_logit": True}, 0),
        ("bigbird", {"sink_logit": True, "positions": "rotary"}, 0),
        ("full", {"sink_logit": True}, 0),
        ("full", {"sink_logit": True, "positions": "rotary"}, 0),
        ("longformer", {"dilation": [1, 1, 2, 4]}, 0),
        ("longformer", {"sink_logit": True}, 0),
        ("longformer", {"sink_logit": True, "positions": "alibi"}, 0),
        ("longformer", {"sink_logit": True, "global_projections": "shared"}, 0),
        ("longformer", {"sink_logit": True, "positions": "rotary"}, 3),  # four streams of heads are turned back
    ],
    ids=str,
)
def test_positions_biases_and_sinks_add_few(name: str, options: dict[str, object], more: int) -> None:
    """In all layouts, with global tokens where it takes them; `more` of them backward."""
    for what, forward, backward in added(name, kernel=KERNELS[name], **options):
        assert forward <= FORWARD, f"{what}: {forward} forward"
        assert backward <= BACKWARD + more, f"{what}: {backward} backward"


@pytest.mark.parametrize("length", [300, 900])
def test_segments_of_memories_run_together(length: int) -> None:
    """No more for more segments, whatever their lengths, with the loss that compression learns from."""
    for what, forward, backward in added("compressive", length, segment_length=64, memory_length=64):
        assert forward <= FORWARD, f"{what}: {forward} forward"
        assert backward <= BACKWARD, f"{what}: {backward} backward"


def test_a_turn_of_the_recurrence_takes_a_bounded_number() -> None:
    """Of all documents at once: turns are those of the longest."""
    for what, forward, backward in added("block_recurrent", window=20, states=8):
        turns = 7 if "packed" in what else 14
        assert forward <= FORWARD + TURNS[0] + turns * TURN[0], f"{what}: {forward} forward"
        assert backward <= BACKWARD + TURNS[1] + turns * TURN[1], f"{what}: {backward} backward"


def of_a_model(length: int = 300, **options: object) -> dict[str, tuple[int, int]]:
    """Operators of two layers and what stands around them, forward and backward, in each layout that they take."""
    model = zoo.Transformer(**{"vocab": 256, "dim": 64, "depth": 2, "heads": 4, "positions": "none", **options})
    found = {}
    for what, given in layouts(2, length):
        layout = Layout.plain(2, length) if given is None else Layout.of(zoo.Tokens.of(*given))
        ids = torch.randint(0, 256, (2, length))
        try:
            model(ids, layout).logits.sum().backward()
        except zoo.Unsupported:
            continue
        model.zero_grad()
        found[what] = counted(lambda ids=ids, layout=layout: model(ids, layout).logits)
    return found


def test_a_models_own_global_tokens_add_little_to_global_ones() -> None:
    inner = {"name": "longformer", "kernel": "flex"}
    marked = of_a_model(attention=inner)["global"]
    found = of_a_model(attention={"name": "global_tokens", "inner": [inner]})
    assert len(found) >= 5
    for what, (forward, backward) in found.items():
        assert forward <= marked[0] + GLOBAL[0], f"{what}: {forward} forward"
        assert backward <= marked[1] + GLOBAL[1], f"{what}: {backward} backward"


@pytest.mark.parametrize("segments", [1, 3, 6])
def test_a_segment_between_memory_tokens_takes_a_bounded_number(segments: int) -> None:
    alone = of_a_model(attention="full")
    each = [max(count[side] for count in alone.values()) + SEGMENT[side] for side in (0, 1)]
    found = of_a_model(attention={"name": "memory_tokens", "inner": ["full"], "segment_length": 300 // segments})
    assert len(found) >= 4
    for what, (forward, backward) in found.items():
        rounds = segments + 2 * ("packed" in what)  # documents of a row follow one another
        assert forward <= rounds * each[0], f"{what}: {forward} forward"
        assert backward <= rounds * each[1], f"{what}: {backward} backward"


@pytest.mark.parametrize("length", [300, 1500])
def test_a_hierarchical_layer_takes_a_bounded_number(length: int) -> None:
    found = of_a_model(length, attention="hierarchical")
    assert len(found) >= 4
    for what, (forward, backward) in found.items():
        assert forward <= 2 * HIERARCHICAL[0], f"{what}: {forward} forward"
        assert backward <= 2 * HIERARCHICAL[1], f"{what}: {backward} backward"
