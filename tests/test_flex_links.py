"""FlexAttention for patterns of blocks, first tokens and positions in a cache: against the definition in float64.

Uncompiled on a CPU, as in test_flex.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_flex import LAYOUTS, call_of, small_blocks, tokens_of
from torch.nn.attention import flex_attention as torch_flex

import attention_zoo as zoo
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.ops.pattern import facts, flex
from attention_zoo.ops.pattern.flex_links import linked

__all__ = ["small_blocks"]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_cuda.py runs it compiled"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of torch, that this way is slow
]
BIGBIRD: list[dict[str, Any]] = [
    {"positions": "alibi"},
    {"positions": "alibi", "causal": False, "kv_heads": 1, "sink_logit": True},
    {"positions": "rotary", "causal": False, "sink_logit": True, "window_blocks": 1, "random": 2},
    {"extra_global_tokens": 2, "random": 0, "sink_logit": True},
    {"causal": False, "plan": "reference", "positions": "alibi", "sink_logit": True},
    {"causal": False, "plan": "reference", "random": 0},
    {"causal": False, "plan": "reference_eval", "kv_heads": 1},
]
CACHED = {"sinks": 3, "sink_positions": "cache"}
LONGFORMER: list[dict[str, Any]] = [
    {"sinks": 3, "dilation": [1, 3]},
    {"sinks": 3, "dilation": [2, 1], "positions": "alibi", "sink_logit": True, "global_projections": "shared"},
    {**CACHED, "positions": "rotary"},
    {**CACHED, "positions": "rotary", "dilation": [1, 3], "sink_logit": True, "global_projections": "shared"},
    {**CACHED, "positions": "rotary", "kv_heads": 1, "scale": -0.3},
    {**CACHED, "positions": "alibi", "dilation": 3},
    {**CACHED, "positions": "alibi", "sink_logit": True, "kv_heads": 1, "global_projections": "shared"},
]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Kernels are chosen as there, but for Triton's; the calls of FlexAttention, which has float64 uncompiled."""
    found: list[object] = []
    attend = flex.attend
    monkeypatch.setattr(facts.on_cuda, "__code__", (lambda call: None).__code__)
    monkeypatch.setattr(facts.on_cpu, "__code__", (lambda call: "it runs on CPU").__code__)
    monkeypatch.setattr(flex, "refuse", lambda q: None)
    monkeypatch.setattr(flex, "attend", lambda *given: found.append(given) or attend(*given))
    return found


def made(name: str, options: dict[str, Any], **shared: Any) -> Any:
    sizes = {"bigbird": {"block": 7, "random": 1}, "longformer": {"window": 5}}[name]
    layer = zoo.build(name, **{"dim": 32, "heads": 2, **sizes, **options, **shared}).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "options"),
    [*(("bigbird", options) for options in BIGBIRD), *(("longformer", options) for options in LONGFORMER)],
    ids=str,
)
def test_a_layer_equals_its_definition(on_cuda: list[object], name: str, options: dict[str, Any], layout: str) -> None:
    layer, length = made(name, options), 61
    tokens = tokens_of(layout, length)
    x = torch.randn(2, length, 32, dtype=torch.float64)
    x[~tokens.valid] = torch.nan
    x.requires_grad_()
    weight, found = torch.randn(2, length, 32), []
    for kernel in ("dense", "flex"):
        layer.kernel = kernel
        out = layer(x, tokens).hidden
        grads = torch.autograd.grad((out * weight)[tokens.valid].sum(), [x, *layer.parameters()], allow_unused=True)
        found.append([out[tokens.valid], *(each for each in grads if each is not None)])
    assert len(on_cuda) == 1, "global tokens are taken along"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("options", [LONGFORMER[3], BIGBIRD[1]], ids=str)
def test_short_calls_and_large_scores(on_cuda: list[object], options: dict[str, Any], length: int) -> None:
    layer = made("longformer" if "sinks" in options else "bigbird", options)
    x = torch.randn(2, length, 32, dtype=torch.float64)
    with torch.no_grad():
        x *= 200 / layer.to_q(x).abs().max()
    found = []
    for kernel in ("dense", "flex"):
        leaf = x.clone().requires_grad_()
        call, _ = call_of(layer, leaf, zoo.Tokens.of(torch.ones(2, length, dtype=torch.bool)))
        kernels = {each.name: each for each in layer.kernels}
        out = kernels[kernel].run(call)
        found.append((out, torch.autograd.grad(out.sin().sum(), leaf)[0]))
    for a, b in zip(*found):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [BIGBIRD[0], BIGBIRD[1], BIGBIRD[4], {"block": 40, "random": 2}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_heads_lists_hold_what_it_sees(on_cuda: list[object], options: dict[str, Any], layout: str) -> None:
    """Against the mask of each pair, which torch asks on a CPU without any lists; and few blocks more."""
    layer: PatternAttention = made("bigbird", options)
    call, _ = call_of(layer, torch.randn(2, 200, 32, dtype=torch.float64), tokens_of(layout, 200))
    flex.FLEX.run(call)
    ((q, k, _, lists, (mask, _), _),) = on_cuda
    seen = torch_flex.create_mask(mask, 2, 2, q.shape[2], k.shape[2], device="cpu")
    needed = seen.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).any(5).any(3).any(0)  # [H, n, m]
    forth, back, whole, whole_back = lists
    for head in range(2):
        found = listed(forth, head, needed.shape[2]) | listed(whole, head, needed.shape[2])
        both = listed(back, head, needed.shape[1]) | listed(whole_back, head, needed.shape[1])
        assert torch.equal(found, both.T)
        assert (found | ~needed[head]).all(), "a block with a visible pair is missing"
    assert int(forth.number.sum()) < 0.75 * 2 * needed[0].numel() or layout == "many global, in one row"


def listed(lists: Any, head: int, columns: int) -> torch.Tensor:
    found = torch.zeros(lists.number.shape[-1], columns, dtype=torch.bool)
    for row, count in enumerate(lists.number[0, head].tolist()):
        found[row, lists.blocks[0, head, row, :count].long()] = True
    return found


def test_tables_of_links_grow_with_the_length_and_are_kept() -> None:
    layer = zoo.build("bigbird", dim=16, heads=1, block=4)
    sizes = []
    for length in (512, 1024, 2048):
        q = torch.zeros(1, 1, length, 16)
        calls = [layer._call(q, q, q, None, None, None) for _ in range(2)]
        tables = [linked(call, length, length) for call in calls]
        assert tables[0].links is tables[1].links, "of a call whose tokens its shape implies"
        sizes.append(sum(each.numel() for each in tables[0] if each is not None))
    assert sizes[2] == 2 * sizes[1] == 4 * sizes[0]
