"""H-Transformer-1D: which level covers which pair, and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references.h_transformer_1d import level_of

import attention_zoo as zoo
from attention_zoo.contract import Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.levels import levels


def covered(layer, layout: Layout) -> np.ndarray:
    """[L, L], 1 + the level that covers each pair of a row's tokens; a pair that is covered twice fails."""
    L = layout.valid.shape[1]
    members = [np.eye(L, dtype=bool) & layout.host.valid[0]]  # [columns of the level, tokens]; padding is hidden
    parts = [(layer._near(layout, layout), members[0])]
    for number, level in layer._up(layout):
        halves, share = level.halves[0].numpy(), level.share[0].numpy() > 0
        below = members[-1][halves] & share[:, None]
        members.append(below[::2] | below[1::2])
        parts.append((layer._far(layout, level.groups, number + 1), members[-1]))
    found = np.zeros((L, L), np.int64)
    for number, (ranges, inside) in enumerate(parts):
        for seen in ranges:
            for i in range(L):
                columns = inside[seen.first[0, i] : seen.stop[0, i]].sum(0)
                assert (columns <= 1).all()
                assert not (found[i][columns > 0] > 0).any(), f"token {i} sees some keys twice"
                found[i] += (number + 1) * columns
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block", "length"), [(2, 1), (2, 4), (2, 5), (2, 37), (4, 64), (6, 97), (4, 130)])
def test_every_pair_is_covered_once_by_the_finest_level_that_holds_it(block: int, length: int, causal: bool) -> None:
    layer = zoo.build("h_transformer_1d", dim=8, heads=2, causal=causal, block=block)
    found = covered(layer, Layout.plain(1, length))
    for i in range(length):
        for j in range(length):
            expected = 0 if causal and j > i else 1 + level_of(i, j, block)
            assert found[i, j] == expected, f"pair {i}, {j}"


def test_padding_and_documents_fall_into_no_group() -> None:
    layer = zoo.build("h_transformer_1d", dim=8, heads=2, causal=False, block=2)
    valid = torch.rand(1, 80, generator=torch.Generator().manual_seed(0)) < 0.7
    document = (torch.arange(80)[None] >= 43).long()
    layout = Layout.of(Tokens.of(valid, document=document))
    found, host = covered(layer, layout), layout.host
    for i in range(80):
        for j in range(80):
            same = host.valid[0, i] and host.valid[0, j] and host.document[0, i] == host.document[0, j]
            expected = 1 + level_of(int(host.position[0, i]), int(host.position[0, j]), 2) if same else 0
            assert found[i, j] == expected


@pytest.mark.parametrize("causal", [True, False])
def test_equal_keys_make_the_hierarchy_exact(causal: bool) -> None:
    """Where all keys of a group are the same its mean is no approximation: full attention over means of values."""
    torch.manual_seed(0)
    layer = zoo.build("h_transformer_1d", dim=8, heads=2, causal=causal, block=4).double()
    q, v = torch.randn(2, 1, 2, 200, 4, dtype=torch.float64)
    k = torch.randn(1, 2, 1, 4, dtype=torch.float64).expand(1, 2, 200, 4)
    got = layer.attend(q, k, v)
    seen = v.cumsum(2) / torch.arange(1, 201, dtype=torch.float64)[:, None]
    expected = seen if causal else seen[:, :, -1:]
    assert (got - expected).abs().max() < 1e-12


def test_groups_hold_the_mean_of_their_tokens() -> None:
    layout = Layout.of(Tokens.of(torch.tensor([[True, False, True, True, True, True], [True] * 6])))
    x = torch.arange(12.0).view(2, 1, 6, 1)
    one, two = levels(layout, 2)
    assert one.mean(x)[:, 0, :, 0].tolist() == [[1.0, 3.5, 5.0], [6.5, 8.5, 10.5]]
    assert two.mean(one.mean(x))[:, 0, :, 0].tolist() == [[2.25, 5.0], [7.5, 10.5]]
    assert two.log_count.exp()[0].round().tolist() == [4, 1]
    assert not one.paired
    assert all(level.paired for level in levels(Layout.plain(2, 7), 3))


@pytest.mark.parametrize("block", [0, 3, -2])
def test_a_block_that_cannot_be_halved_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="block must be an even number of at least 2"):
        zoo.build("h_transformer_1d", dim=8, heads=2, block=block)


def test_pairs_are_counted() -> None:
    layer = zoo.build("h_transformer_1d", dim=8, heads=2, causal=False, block=4)
    assert layer.pairs(12) == 4 * 8 + 4 * 12 + 4 * 8 + 2 * 2 * 4, "three blocks: the outer two see each other halved"
