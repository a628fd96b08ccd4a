"""What the executor believes of a pattern: its bias is pairwise, `near` and `reach` never hide a cell that is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Tokens
from attention_zoo.testing.case import PRIME, Case, same
from attention_zoo.testing.check import check


def is_pattern(case: Case) -> bool:
    return issubclass(case.cls, PatternAttention)


def build(case: Case, causal: bool) -> PatternAttention:
    layer = case.build(causal=causal)
    assert isinstance(layer, PatternAttention)
    return layer


@check(is_pattern)
def bias_is_pairwise(case: Case) -> None:
    """A cell depends on its two tokens alone: any rows and columns, in any order, give the same cells."""
    shuffled = torch.Generator().manual_seed(5)
    for causal in case.sides:
        layer = build(case, causal)
        for layout, tokens in case.layouts(PRIME):
            marked = layer.mark(tokens)
            whole = layer.bias(marked, marked).expand(3, case.heads, PRIME, PRIME)
            rows, columns = (torch.randperm(PRIME, generator=shuffled)[:7] for _ in range(2))
            some = layer.bias(marked.cut(rows), marked.cut(columns)).expand(3, case.heads, 7, 7)
            same(some, whole[:, :, rows[:, None], columns], f"{case.name} causal={causal} {layout}: bias of some cells")
            assert not bool((whole == torch.inf).any() | whole.isnan().any()), (
                f"{case.name} causal={causal} {layout}: bias must be finite or -inf"
            )


@check(is_pattern)
def marking_looks_at_one_token(case: Case) -> None:
    """`mark` decides for each token by itself, is idempotent, and changes nothing but `is_global`."""
    columns = torch.tensor([23, 2, 11, 0, 28])
    for causal in case.sides:
        layer = build(case, causal)
        for layout, tokens in case.layouts(PRIME):
            where = f"{case.name} causal={causal} {layout}: mark"
            marked = layer.mark(tokens)
            for other, what in (
                (layer.mark(marked), "is not idempotent"),
                (marked._replace(is_global=marked.is_global | tokens.is_global), "unmarks a global token"),
            ):
                assert torch.equal(other.is_global, marked.is_global), f"{where} {what}"
            some = layer.mark(tokens.cut(columns))
            assert torch.equal(some.is_global, marked.cut(columns).is_global), f"{where} depends on other tokens"
            for name in ("position", "valid", "document", "length"):
                assert torch.equal(getattr(marked, name), getattr(tokens, name)), f"{where} changes {name}"


@check(is_pattern)
def near_hides_nothing(case: Case) -> None:
    """Where any cell of a tile is seen, `near` says so; no seen key is farther than `reach`."""
    for causal in case.sides:
        layer = build(case, causal)
        tokens = layer.mark(Tokens.all_valid(1, 2 * PRIME))
        position, length = tokens.position[0], tokens.length[:1, :1, None]
        seen = (layer.bias(tokens, tokens) > -torch.inf).any(1).any(0)
        if causal:
            seen = seen & (position[None] <= position[:, None])
        if layer.reach is not None:
            gap = (position[:, None] - position[None]).abs()
            farthest = int(torch.where(seen, gap, 0).max())
            assert farthest <= layer.reach, (
                f"{case.name} causal={causal}: a key {farthest} positions away is seen, but reach is {layer.reach}"
            )
        for size in (1, 3, 8):
            lo, hi = position[::size], position[size - 1 :: size]
            hi = torch.cat([hi, position[-1:]])[: len(lo)]
            near = layer.near(lo[None, :, None], hi[None, :, None], lo[None, None], hi[None, None], length)
            near = near.any(0).expand(len(lo), len(lo))
            missed = tiles(seen, size) & ~near
            assert not bool(missed.any()), (
                f"{case.name} causal={causal}: tile (query, key) {missed.nonzero()[0].tolist()} of size {size} is "
                f"seen, but near() says that it cannot matter"
            )


def tiles(seen: Tensor, size: int) -> Tensor:
    """Bool [n, n]: whether any cell of each tile is seen."""
    pad = -seen.shape[0] % size
    seen = torch.nn.functional.pad(seen, (0, pad, 0, pad))
    return seen.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
