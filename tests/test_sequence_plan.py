"""What is said on paper of several processes: formulas against what they send, and the page that is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_zoo.model.transformer import Transformer
from attention_zoo.parallel.sequence.paper import Sent, Shape, sent
from tests.processes import together
from tests.sequence_models import ROWS, SHARED, Found
from tests.test_sequence_model import MODELS, TINY

EXACT = {
    "longformer": {"attention": TINY["longformer"]},
    "a window beyond neighbours": {"attention": {"name": "longformer", "window": 40}},
    "sinks": {"attention": {"name": "longformer", "window": 3, "sinks": 2}},
    "adaptive_span": {"attention": TINY["adaptive_span"]},
    "full": {"attention": "full"},
    "grouped heads": {"attention": {"name": "longformer", "window": 5, "kv_heads": 1}},
    "memory_compressed": {"attention": TINY["memory_compressed"]},
    **{
        name: MODELS[name]
        for name in (
            "transformer_xl", "transformer_xl, same length", "transformer_xl, long memory", "compressive",
            "compressive, dilated", "block_recurrent", "memory_tokens", "hierarchical", "h_transformer_1d",
            "short convolution", "gated convolution", "hourglass",
        )
    },
}  # fmt: skip
LENGTHS = (48, 61)


def counted(found: Found, way: str) -> float:
    """Bytes of all kinds, one way."""
    return sum(count for kind, count in found.sent.items() if kind.endswith(way))


def on_paper(options: dict[str, Any], length: int, processes: int) -> list[Sent]:
    model = Transformer(**SHARED | options).double()
    return sent(model, Shape(ROWS, length, processes, torch.float64))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_formulas_say_what_is_sent(size: int) -> None:
    cases = [(name, length) for name in EXACT for length in LENGTHS[: 1 if size == 2 else 2]]
    ran = together(size, "tests.sequence_models:all_compared", [(EXACT[n], "none", at, "float64") for n, at in cases])
    wrong = {}
    for (name, length), each in zip(cases, ran, strict=True):
        found, paper = Found(*each), on_paper(EXACT[name], length, size)
        if name == "full" and length % (2 * size):
            continue  # runs of a zig-zag differ in length
        for way, said in (("forward", sum(x.forward for x in paper)), ("backward", sum(x.backward for x in paper))):
            if said != counted(found, way):
                wrong[name, length, way] = said, found.sent
    assert not wrong, wrong
