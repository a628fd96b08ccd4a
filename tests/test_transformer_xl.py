"""Transformer-XL against the loop over segments, its state, its memory and its speed paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from references.transformer_xl import reference
from torch import Tensor

from attention_zoo.attention.transformer_xl import TransformerXL
from attention_zoo.contract import Tokens

DIM, HEADS = 12, 3


def build(segment: int = 5, memory: int = 4, dtype: torch.dtype = torch.float64, **options) -> TransformerXL:
    """Weights large enough to make sharp distributions; u and v far from zero."""
    generator = torch.Generator().manual_seed(1)
    options = {"dim": DIM, "heads": HEADS, **options}
    layer = TransformerXL(segment_length=segment, memory_length=memory, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    return layer.to(dtype)


def data(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layouts(length: int) -> Iterator[tuple[str, Tokens]]:
    """Rows of tokens as they may lie in a batch."""
    column = torch.arange(length)[None]
    count = torch.tensor([[length], [-(-2 * length // 3)], [-(-length // 4)]])
    yield "whole", Tokens.all_valid(2, length)
    yield "padded right", Tokens.of(column < count)
    yield "padded left", Tokens.of(column >= length - count)
    holes = torch.ones(3, length, dtype=torch.bool)
    holes[0, 1::3] = False
    holes[1, length // 2 :: 2] = False
    yield "holes", Tokens.of(holes)
    document = column // torch.tensor([[max(1, length // 2)], [3], [length]])
    yield "documents, padded left", Tokens.of(column >= length - count, document=document)
    yield "documents with holes", Tokens.of(holes, document=document)


def gradients(layer: TransformerXL, x: Tensor, out: Tensor, valid: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    return dict(zip(names, torch.autograd.grad((out * weight)[valid].sum(), [x, *layer.parameters()])))


def assert_close(actual: Tensor, expected: Tensor, where: str, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")


def feed(layer: TransformerXL, x: Tensor, tokens: Tokens, cuts: list[int]):
    """Call by call; the state goes from one to the next."""
    state, hidden = layer.initial_state(len(x)), []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]]):
        out = layer(x[:, start:stop], tokens.cut(slice(start, stop)), state=state)
        hidden.append(out.hidden)
        state = out.state
    return torch.cat(hidden, 1), state


@pytest.mark.parametrize("kernel", ["auto", "gather"])
@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize(("segment", "memory"), [(5, 0), (5, 3), (5, 5), (4, 9), (1, 6), (16, 2)])
def test_one_call_equals_the_loop_over_segments(segment: int, memory: int, same_length: bool, kernel: str) -> None:
    layer = build(segment, memory, same_length=same_length, kernel=kernel)
    for length in sorted({1, max(1, segment - 1), segment, segment + 1, 2 * segment + 3, 17}):
        for layout, tokens in layouts(length):
            where = f"length {length}, {layout}"
            x = data(len(tokens.valid), length).requires_grad_()
            fast, slow = layer(x, tokens).hidden, reference(layer, x, tokens)
            assert_close(fast[tokens.valid], slow[tokens.valid], where)
            expected = gradients(layer, x, slow, tokens.valid)
            for name, gradient in gradients(layer, x, fast, tokens.valid).items():
                assert_close(gradient, expected[name], f"{where}: gradient of {name}")
