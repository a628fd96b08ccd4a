"""What the executor believes of a pattern: its bias is pairwise, and what `reach` says of it is true."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Tokens
from attention_zoo.layout.reach import Tiles
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
def reach_hides_nothing(case: Case) -> None:
    """No key is seen beyond `reach`: not by its distance, and not by the tiles that it says can matter."""
    for causal in case.sides:
        layer = build(case, causal)
        where = f"{case.name} causal={causal}: reach={layer.reach}"
        seen, position = seen_pairs(layer)
        farthest = int((position[:, None] - position[None]).masked_fill(~seen, 0).max())
        if layer.reach.farthest is not None:
            kept = seen & (position[None] >= layer.reach.first)
            farthest = int((position[:, None] - position[None]).masked_fill(~kept, 0).max())
            assert farthest <= layer.reach.farthest, (
                f"{where} hides keys: one {farthest} positions back is seen, farther than {layer.reach.farthest}"
            )
        for size in (1, 3, 8):
            lo = position[::size].numpy()
            hi = np.minimum(lo + size - 1, len(position) - 1)
            length = np.full((1, 1, 1), len(position))
            asked = Tiles(lo[None, :, None], hi[None, :, None], lo[None, None], hi[None, None], length, size)
            near = torch.from_numpy(np.broadcast_to(layer.reach.near(asked), (1, len(lo), len(lo)))[0].copy())
            missed = tiles(seen, size) & ~near
            assert not bool(missed.any()), (
                f"{where} hides keys: tile (query, key) {missed.nonzero()[0].tolist()} of size {size} is seen by "
                f"`bias`, but `reach` says that it cannot matter"
            )


@check(lambda case: is_pattern(case) and True in case.sides and case.cls.declared.global_tokens == "any")
def global_tokens_see_what_is_kept(case: Case) -> None:
    """A cache that forgets by `reach` has not the keys that a later global token must see."""
    layer = build(case, True)
    assert layer.reach.farthest is None or layer.computes_apart, (
        f"{case.name}: keys farther than {layer.reach.farthest} back are forgotten by its reach, so global tokens of "
        f'later calls cannot see them: declare global_tokens="first_call" (or "none")'
    )


@check(is_pattern)
def weights_are_what_reach_says(case: Case) -> None:
    """`reach.weights` is true of `bias`: fast kernels believe it."""
    for causal in case.sides:
        layer = build(case, causal)
        weights, where = layer.reach.weights, f"{case.name} causal={causal}: weights={layer.reach.weights!r}"
        if weights == "any":
            continue
        tokens = Tokens.all_valid(1, 2 * PRIME)
        bias = layer.bias(tokens, tokens).expand(1, case.heads, 2 * PRIME, 2 * PRIME)[0]
        later = torch.full((2 * PRIME, 2 * PRIME), causal).triu(1)
        finite = (bias > -torch.inf) & ~later
        if weights == "counts":
            times = bias[finite].double().exp()
            assert bool(((times - times.round()).abs() < 1e-4).all()), (
                f"{where}, but some bias is no logarithm of a count"
            )
            assert bool((times < 1024).all()), f"{where}, but some key counts {int(times.max())} times"
            continue
        shifted = (bias[:, 1:, 1:] - bias[:, :-1, :-1]).nan_to_num().masked_fill(later[..., 1:, 1:], 0)
        if not layer.reach.first:
            assert not bool(shifted.any()), f"{where}, but `bias` depends on more than the difference of positions"
        if weights == "uniform":
            position = tokens.position[0]
            inside = layer.reach.inside(position[:, None], position[None]).expand_as(bias)
            assert bool((bias[finite] == 0).all()), f'{where}, but some keys weigh more than others; say "counts"'
            assert bool((finite == (inside & ~later)).all()), (
                f"{where}, but `bias` hides keys within reach, or shows others"
            )


def seen_pairs(layer: PatternAttention) -> tuple[Tensor, Tensor]:
    """Which pairs of one long document are seen, by any head, and its positions."""
    tokens = layer.mark(Tokens.all_valid(1, 2 * PRIME))
    position = tokens.position[0]
    seen = (layer.bias(tokens, tokens) > -torch.inf).any(1).any(0)
    return (seen & (position[None] <= position[:, None]) if layer.causal else seen), position


def tiles(seen: Tensor, size: int) -> Tensor:
    """Bool [n, n]: whether any cell of each tile is seen."""
    pad = -seen.shape[0] % size
    seen = torch.nn.functional.pad(seen, (0, pad, 0, pad))
    return seen.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
