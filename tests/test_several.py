"""Groups of tokens as keys, and one softmax over several sets of keys, against plain definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_zoo import Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import behind
from attention_zoo.layout.pooled import pooled
from attention_zoo.layout.reach import Anywhere, Band
from attention_zoo.measure.memory import peak_memory
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several
from attention_zoo.testing.case import close

B, H, K, D = 3, 4, 2, 8


def layouts(length: int) -> list[Layout]:
    generator = torch.Generator().manual_seed(length)
    column = torch.arange(length)
    kept = torch.tensor([[length], [max(1, length // 2)], [0]])
    holes = torch.rand(B, length, generator=generator) < 0.7
    document = (column // torch.tensor([[max(1, length // 3)], [5], [length]])).expand(B, length)
    masks = [torch.ones(B, length, dtype=torch.bool), column < kept, column >= length - kept, holes]
    return [Layout.of(Tokens.of(mask, None, each)) for mask in masks for each in (None, document)]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 17, 40])
def test_groups_are_complete_and_of_one_document(length: int, size: int) -> None:
    for layout in layouts(length):
        found = pooled(layout, size)
        assert pooled(layout, size) is found
        position, document, valid = (x.tolist() for x in (layout.position, layout.document, layout.valid))
        for row in range(B):
            there: dict[tuple[int, int], list[int]] = {}
            for column in range(length):
                if valid[row][column]:
                    there.setdefault((document[row][column], position[row][column] // size), []).append(column)
            complete = {key: columns for key, columns in there.items() if len(columns) == size}
            groups = found.groups
            real = [g for g in range(groups.valid.shape[1]) if groups.valid[row, g]]
            got = {
                (int(groups.document[row, g]), int(groups.position[row, g])): found.members[row, g].tolist()
                for g in real
            }
            assert got == complete
            for g in real:
                last = found.members[row, g, -1]
                assert found.ends.position[row, g] == layout.position[row, last]
            newest = list(there.values())[-1] if there else []
            assert found.waiting[row].nonzero()[0].tolist() == (newest if len(newest) < size else [])
        x = torch.randn(B, length, 5)
        taken = found.take(x)
        for row, g in found.groups.valid.nonzero().tolist():
            assert torch.equal(taken[row, g], x[row, found.members[row, g]])


def test_what_waits_is_completed_by_the_next_call() -> None:
    """Cut anywhere: the groups of the pieces, with what waited in front, are those of the whole."""
    whole = pooled(Layout.plain(1, 23), 4)
    for cut in range(1, 23):
        first = Layout.plain(1, cut)
        waiting = torch.from_numpy(pooled(first, 4).waiting)
        columns = waiting[0].nonzero()[:, 0]
        rest = Layout.of(Tokens.of(torch.ones(1, 23 - cut, dtype=torch.bool), start=cut))
        keys = rest if not len(columns) else behind(first.columns(slice(int(columns[0]), cut)), rest)
        numbers = [*pooled(first, 4).groups.position[0].tolist(), *pooled(keys, 4).groups.position[0].tolist()]
        assert numbers == whole.groups.position[0].tolist()


def reference(q: Tensor, queries: Layout, sets: list[Keys], causal: bool, scale: float) -> Tensor:
    scores, values = [], []
    for each in sets:
        k, v = (x.repeat_interleave(H // K, 1) for x in (each.k, each.v))
        gap = queries.position[:, :, None] - each.layout.position[:, None, :]
        seen = each.layout.valid[:, None, :] & (queries.document[:, :, None] == each.layout.document[:, None, :])
        if causal:
            seen = seen & (gap >= 0)
        if isinstance(each.reach, Band):
            seen = seen & (gap.abs() <= each.reach.farthest)
        seen = seen & queries.valid[..., None]
        score = q @ k.transpose(-1, -2) * scale
        score = score if each.weight is None else score + each.weight[:, None, None]
        scores.append(score.masked_fill(~seen[:, None], -torch.inf))
        values.append(v)
    whole = torch.cat(scores, -1)
    nothing = (whole == -torch.inf).all(-1, keepdim=True)
    return (whole.masked_fill(nothing, 0).softmax(-1) * ~nothing) @ torch.cat(values, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 17, 150])
def test_one_softmax_over_tokens_and_their_summaries(length: int, causal: bool) -> None:
    """A window of tokens, groups of four that count for four, and groups of three that count by a learned weight."""
    for layout in layouts(length):
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()

        q, k, v = random(B, H, length, D), random(B, K, length, D), random(B, K, length, D)
        fours, threes = pooled(layout, 4).ends, pooled(layout, 3).ends
        G, T = fours.valid.shape[1], threes.valid.shape[1]
        learned = random(B, T)
        count = torch.full((B, G), math.log(4), dtype=torch.float64)
        sets = [
            Keys(k, v, layout, Band(9)),
            Keys(random(B, K, G, D), random(B, K, G, D), fours, Anywhere(), count),
            Keys(random(B, K, T, D), random(B, K, T, D), threes, Band(40), learned),
        ]
        inputs = [q, learned, *(x for each in sets for x in (each.k, each.v))]
        got = attend_to_several(q, layout, sets, scale=0.7, causal=causal)
        want = reference(q, layout, sets, causal, 0.7)
        close(got, want, f"length {length}")
        with torch.no_grad():
            close(attend_to_several(q, layout, sets, scale=0.7, causal=causal), want, f"length {length}, no gradients")
        weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
        pairs = zip(*(torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True) for x in (got, want)))
        for mine, theirs in pairs:
            if theirs is not None and theirs.numel():
                close(torch.zeros_like(theirs) if mine is None else mine, theirs, f"length {length}: a gradient", 1e-10)


def test_without_gradients_no_keys_are_copied() -> None:
    """A step beside a long past: less memory than a tenth of the keys."""
    length, width = 50_000, 64
    k, v = torch.randn(2, 1, 1, length, width)
    null = torch.zeros(1, 1, 1, width)
    past, step = Layout.plain(1, length), Layout.plain(1, 1, start=length)
    sets = [Keys(null, null, None), Keys(k, v, past)]
    q = torch.randn(1, 1, 1, width)

    def call() -> Tensor:
        with torch.no_grad():
            return attend_to_several(q, step, sets, scale=1, causal=True)

    call()
    assert peak_memory(call).peak_bytes < k.nbytes / 10


def test_a_reach_with_gaps_is_refused() -> None:
    x = torch.zeros(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"reach must be Anywhere or a Band without gaps"):
        attend_to_several(
            x, Layout.plain(1, 3), [Keys(x, x, Layout.plain(1, 3), Band(2, stride=2))], scale=1, causal=True
        )


@pytest.mark.parametrize("reach", [Band((1, 2), ahead=1), Band(3, ahead=(1, 2)), Band((1, 2)), Band(2, first=1)])
def test_heads_of_their_own_are_refused(reach: Band) -> None:
    x = torch.zeros(1, 2, 3, 2)
    with pytest.raises(ValueError, match=r"reach must be Anywhere or a Band without gaps, the same for all heads"):
        attend_to_several(x, Layout.plain(1, 3), [Keys(x, x, Layout.plain(1, 3), reach)], scale=1, causal=True)


def test_what_is_no_set_of_keys_is_refused() -> None:
    x, layout = torch.zeros(1, 1, 3, 2), Layout.plain(1, 3)
    with pytest.raises(ValueError, match="sets must hold at least one set of keys, got none"):
        attend_to_several(x, layout, [], scale=1, causal=True)
    with pytest.raises(ValueError, match=r"weight must be of shape \(1, 3\) like the keys, got \(3,\)"):
        attend_to_several(x, layout, [Keys(x, x, layout, weight=torch.zeros(3))], scale=1, causal=True)
    assert pooled(Tokens.all_valid(1, 5), 2).groups.valid.shape == (1, 2)
