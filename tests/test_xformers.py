"""xformers' local masks against the definition, by their own `materialize()`; the kernel needs a GPU (test_cuda.py)."""

from __future__ import annotations

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.ops import xformers as ours


def call_of(layer, length: int, columns: int | None = None, tokens: zoo.Tokens | None = None):
    columns = columns or length
    q, k = torch.zeros(1, layer.heads, length, 16), torch.zeros(1, layer.heads, columns, 16)
    return layer._call(q, k, k, None, tokens, None, None)


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


def test_it_refuses_with_a_reason() -> None:
    def reason(length: int = 9, tokens: zoo.Tokens | None = None, **options) -> str | None:
        return ours.unfit(call_of(zoo.build("longformer", dim=32, heads=2, **options), length, None, tokens))

    valid = torch.ones(1, 9, dtype=torch.bool)
    right = torch.arange(9)[None] < 6
    flags = torch.arange(9)[None] == 4
    assert reason() is None
    assert reason(tokens=zoo.Tokens.of(right)) is None
    assert "two-sided" in str(reason(tokens=zoo.Tokens.of(right), causal=False))
    assert "left" in str(reason(tokens=zoo.Tokens.of(right.flip(1))))
    assert "global" in str(reason(tokens=zoo.Tokens.of(valid, flags)))
    assert "documents" in str(reason(tokens=zoo.Tokens.of(valid, None, (torch.arange(9) // 5)[None])))
    assert "dilation" in str(reason(dilation=2))
    assert "position scheme" in str(reason(positions="alibi"))
    assert "no band" in str(ours.unfit(call_of(zoo.build("full", dim=32, heads=2), 9)))
    with pytest.raises(zoo.Unsupported, match="xformers: it runs on CUDA, not on cpu"):
        zoo.build("longformer", dim=32, heads=2, kernel="xformers")(torch.zeros(1, 9, 32))
