"""Dropout of the project's own: how much is dropped, what is left, and its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attention_zoo as zoo
from attention_zoo.ops.dropout import STEPS, Dropout, dropped


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("shape", [(400, 251), (100_003,)])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = dropped(torch.ones(shape, dtype=torch.float64), p)
    zero = found == 0
    share = round(p * STEPS) / STEPS
    assert abs(zero.double().mean() - p) < 4 * (p * (1 - p) / found.numel()) ** 0.5 + 1 / STEPS
    torch.testing.assert_close(found[~zero], torch.full_like(found[~zero], 1 / (1 - share)))


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share a number: no two of them go together."""
    torch.manual_seed(1)
    kept = (dropped(torch.ones(4 * 50_000, dtype=torch.float64), 0.3) != 0).double().view(-1, 4)
    together = torch.corrcoef(torch.cat([kept, kept.roll(1, 0)], 1).T)
    assert (together - torch.eye(8)).abs().max() < 0.02


def test_the_gradient_is_that_of_the_mask() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    found = dropped(x, 0.4)
    (given,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(given, (found / x).detach())
    assert 0 < int((given == 0).sum()) < 35


def test_nothing_and_all_may_be_dropped() -> None:
    x = torch.randn(3, 3)
    assert torch.equal(dropped(x, 1e-9), x)
    assert not dropped(x, 1.0).any()
    assert dropped(torch.zeros(0, 3), 0.5).shape == (0, 3)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_the_same_seed_drops_the_same_and_the_module_draws_from_torchs_generator() -> None:
    x, layer = torch.ones(50, 9), Dropout(0.5)
    assert isinstance(layer, nn.Dropout)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    own = torch.Generator().manual_seed(3)
    assert torch.equal(dropped(x, 0.5, own), first)


def test_wrong_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="probability"):
        Dropout(1.5)


def test_a_models_embedding_and_branches_drop_in_training_alone() -> None:
    torch.manual_seed(4)
    shape: dict[str, Any] = {"vocab": 9, "dim": 64, "heads": 2, "depth": 1}
    model = zoo.Transformer(attention="full", output_dropout=0.5, embedding={"dropout": 0.5}, **shape)
    ids = torch.randint(0, 9, (4, 30))
    seen: dict[str, float] = {}
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Dropout)}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: float((out == 0).double().mean())}))
    model(ids)
    assert seen.keys() == parts.keys()
    assert len(seen) == 3, "the embedding, attention, and feed-forward"
    assert all(abs(share - 0.5) < 0.05 for share in seen.values())
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
