"""One softmax over several sets of keys by FlexAttention, uncompiled on a CPU, against the definition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_several import layouts, reference
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import attention_zoo as zoo
from attention_zoo.layout import kernel
from attention_zoo.layout.pooled import pooled
from attention_zoo.layout.reach import Anywhere, Band
from attention_zoo.ops.pattern import flex, means, several_flex
from attention_zoo.ops.pattern.flex_lists import BlockLists
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_cuda.py runs it compiled"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of torch, that this way is slow
]
pytest.importorskip("triton", reason="triton is not installed")
B, H, K, D = 3, 4, 2, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Each call that it ran."""
    found: list[object] = []
    run = several_flex.run_joined
    monkeypatch.setattr(several_flex, "run_joined", lambda *given: found.append(given) or run(*given))
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(runs: list[object], causal: bool) -> None:
    """A window of tokens, and groups of four that count for four, in every layout."""
    for number, layout in enumerate(layouts(61)):
        torch.manual_seed(number)
        fours = pooled(layout, 4).ends
        G = fours.valid.shape[1]
        shapes = [(B, H, 61, D), *[(B, K, 61, D)] * 2, *[(B, K, G, D)] * 2]
        given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        grad = torch.randn(shapes[0], dtype=torch.float64)
        found = []
        for dtype, attend in ((torch.float64, reference), (torch.float32, attend_to_several)):
            q, *keys = mine = [x.to(dtype).requires_grad_() for x in given]
            count = torch.full((B, G), math.log(4), dtype=dtype)
            sets = [Keys(*keys[:2], layout, Band(20)), Keys(*keys[2:], fours, Anywhere(weights="uniform"), count)]
            out = (
                reference(q, layout, sets, causal, 0.7)
                if attend is reference
                else attend(q, layout, sets, scale=0.7, causal=causal)
            )
            found.append((out, *torch.autograd.grad(out, mine, grad.to(dtype))))
        for a, b in zip(*found):
            torch.testing.assert_close(b.double(), a, atol=2e-4, rtol=2e-4)
    assert len(runs) == number + 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "levels_at_once"),
    [
        ("h_transformer_1d", {"block": 4}, 7),
        ("h_transformer_1d", {"block": 2, "kv_heads": 1}, 2),
        ("h_transformer_1d", {"block": 4}, 1),
        ("memory_compressed", {}, 7),
        ("hierarchical.segments", {"segment_length": 9}, 7),
        ("memory_compressed", {"compression": 5, "kv_heads": 1}, 7),
        ("memory_compressed", {"head_width": 8}, 7),  # channels are filled up
        ("memory_compressed", {"head_width": 5, "kv_heads": 1}, 7),
        ("h_transformer_1d", {"block": 4, "head_width": 8}, 7),
    ],
)
def test_layers_equal_themselves_in_tiles_in_float64(
    monkeypatch: pytest.MonkeyPatch, runs: list[object], name: str, options: dict, levels_at_once: int, causal: bool
) -> None:
    monkeypatch.setattr(means, "AT_ONCE", levels_at_once)
    layer = zoo.build(name, dim=32, heads=2, causal=causal, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # null keys begin as zeros
    layer.double()
    monkeypatch.setattr(flex, "refuse", lambda q: None)  # uncompiled, it has float64
    for layout in layouts(75)[::3]:
        x = torch.randn(B, 75, 32, dtype=torch.float64, requires_grad=True)
        weight, found = torch.randn(B, 75, 32) * layout.valid[..., None], []
        for devices in (("cuda", "cpu"), ("cuda",)):
            monkeypatch.setattr(kernel, "TRITON_DEVICES", devices)
            out = layer(x, zoo.Tokens(*layout)).hidden * layout.valid[..., None]
            found.append((out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    parts = 2 if name == "hierarchical.segments" and causal else 1  # all columns ask summaries, too
    assert len(runs) == parts * len(layouts(75)[::3])


def test_it_refuses_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts(61)[0]
    q, k = torch.zeros(B, H, 61, D), torch.zeros(B, K, 61, D)

    def reason(q: Tensor, weight: Tensor | None = None) -> str | None:
        return several_flex.refuse(q, [Keys(k, k, layout, weight=weight)])

    assert reason(q) is None
    assert "weights learn" in str(reason(q, torch.zeros(B, 61, requires_grad=True)))
    assert "float64" in str(reason(q.double()))
    assert reason(q[:, :, :2]) is None
    assert "fewer than 2" in str(reason(q[:, :, :1]))
    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda",))
    assert "it runs on CUDA, not on cpu" in str(reason(q))


def test_blocks_that_are_left_out_hold_nothing_seen_and_whole_ones_nothing_hidden() -> None:
    block, n, m, generator = 4, 6, 8, np.random.default_rng(0)
    for _ in range(50):
        ends = np.sort(generator.integers(0, m * block + 1, (2, 2, 3, n * block, 2)), -1).astype(np.int32)
        low, high = ends[..., 0], ends[..., 1]
        low[:, :, 2], high[:, :, 2] = 0, 0  # fillers
        high[1], asks, there = low[1], np.ones((2, n * block), bool), np.ones((2, m * block), bool)
        low[0, :, 0, :block], high[0, :, 0, :block] = block, 3 * block  # two blocks that are seen whole
        asks[0, -2:], there[1, -3:] = False, False
        high = np.where(asks[None, :, None], high, low)
        place = np.arange(m * block)
        seen = ((low[..., None] <= place) & (place < high[..., None])).any((0, 2)) & there[:, None]
        tiles = seen.reshape(2, n, block, m, block).swapaxes(2, 3)
        some, every = tiles.any((0, 3, 4)), tiles.all((0, 3, 4))
        part, _, whole, _ = several_flex._lists(low, high, asks, there, block, torch.device("cpu"))
        visited, full = (_pairs(lists, n, m) for lists in (part, whole))
        assert not (some & ~(visited | full)).any()
        assert not (full & ~every).any()
        assert not (visited & full).any()
        assert full[0, 1]
        assert full[0, 2]


def _pairs(lists: BlockLists, n: int, m: int) -> np.ndarray:
    found = np.zeros((n, m), bool)
    count, index = (x[0, 0].numpy() for x in lists)
    for row in range(n):
        found[row, index[row, : count[row]]] = True
    return found
