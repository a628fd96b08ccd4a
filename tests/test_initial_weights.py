"""What mechanisms share begins alike: a parameter's initial value follows from the seed and its name alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo.model.initial import keyed, keys_of, seed_of
from attention_zoo.model.transformer import Transformer
from attention_zoo.training.assembly import assemble
from attention_zoo.training.building import build
from attention_zoo.training.config import check, compose_training, options_of
from attention_zoo.training.models import mechanism_of

SIZES: dict[str, Any] = {"vocab": 16, "dim": 16, "depth": 2, "heads": 2, "short_conv": 3, "head": "lm", "tied": False}


def drawn(seed: int, **options: Any) -> Transformer:
    torch.manual_seed(1000 + seed)  # what was drawn before must not matter
    torch.rand(len(str(options)))
    with keyed(seed) as draws:
        model = Transformer(**{**SIZES, **options})
        draws.again(model)
    return model


def by_key(model: nn.Module) -> dict[str, Tensor]:
    keys = keys_of(model)
    return {keys[name]: value.detach() for name, value in model.named_parameters()}


EVERYONE = (*zoo.available(), *zoo.wrappers())


@pytest.fixture(scope="module")
def everyone() -> dict[str, dict[str, Tensor]]:
    return {name: by_key(drawn(0, attention=name)) for name in EVERYONE}


def test_whatever_two_mechanisms_share_is_bitwise_equal(everyone: dict[str, dict[str, Tensor]]) -> None:
    for one, two in itertools.combinations(everyone, 2):
        mine, other = everyone[one], everyone[two]
        shared = [key for key in mine.keys() & other.keys() if mine[key].shape == other[key].shape]
        assert {"embedding.weight", "head.weight", "blocks.1.layers.1.body.layers.0.into.weight"} <= set(shared)
        assert f"blocks.0.layers.0.body.layers.1.to_{'q' if 'reformer' in (one, two) else 'k'}.weight" in shared
        for key in shared:
            if "block_recurrent" in (one, two) and key.endswith("to_out.bias"):
                # its bounds are those of a matrix of twice the width: the same draw, narrower
                ratio = mine[key] / other[key]
                assert torch.allclose(ratio, ratio[0].expand_as(ratio))
                continue
            assert torch.equal(mine[key], other[key]), f"{key} of {one} and {two}"


@pytest.mark.parametrize("name", EVERYONE)
def test_another_seed_draws_other_weights_and_the_same_seed_the_same(
    name: str, everyone: dict[str, dict[str, Tensor]]
) -> None:
    again, other = by_key(drawn(0, attention=name)), by_key(drawn(1, attention=name))
    for key, value in everyone[name].items():
        assert torch.equal(value, again[key])
        assert torch.equal(value, other[key]) == (bool((value == value.flatten()[0]).all())), key


@pytest.mark.parametrize("name", EVERYONE)
def test_no_two_parameters_of_a_model_begin_alike(name: str, everyone: dict[str, dict[str, Tensor]]) -> None:
    """But for those that are constants, and the copies that a mechanism makes on purpose."""
    known = [(key, value) for key, value in everyone[name].items() if value.unique().numel() > 1]
    for (one, mine), (two, other) in itertools.combinations(known, 2):
        if mine.shape == other.shape and not ("_global" in one or "_global" in two):
            assert not torch.equal(mine, other), (one, two)


def test_the_distribution_is_the_constructors() -> None:
    torch.manual_seed(0)
    plain = Transformer(**{**SIZES, "dim": 64, "attention": "transformer_xl"})
    again = drawn(0, dim=64, attention="transformer_xl")
    for (name, value), other in zip(plain.named_parameters(), again.parameters()):
        value, other = value.detach(), other.detach()
        constant = value.unique().numel() == 1
        assert torch.equal(value, other) == constant, name
        if value.numel() > 1000:
            assert float(value.std()) == pytest.approx(float(other.std()), rel=0.1), name
            assert float(value.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.3), name


@pytest.mark.parametrize(
    "options",
    [
        {"attention": {"name": "memory_tokens", "inner": "longformer"}},
        {"attention": "full", "around": ["memory_tokens", "global_tokens"]},
        {"attention": "full", "reversible": True},
        {"attention": "full", "shorten": "1@1 1@2 1@1", "depth": 3},
    ],
)
def test_what_stands_around_blocks_changes_nothing_in_them(options: dict[str, Any]) -> None:
    mine, plain = by_key(drawn(3, **options)), by_key(drawn(3, attention="full", depth=options.get("depth", 2)))
    inside = [key for key in plain if key.startswith("blocks.")]
    assert len(inside) >= 20
    for key in inside:
        assert torch.equal(mine[key], plain[key]), key


class Odd(nn.Module):
    """Draws in other ways: made at once, changed after, by a slice, as a copy, never."""

    def __init__(self, ahead: int):
        super().__init__()
        torch.randn(ahead)
        self.made = nn.Parameter(torch.randn(4, 3) * 2)
        self.part = nn.Parameter(torch.zeros(4, 3))
        with torch.no_grad():
            self.part[1:3].normal_()
            self.part.mul_(3)
        self.square = nn.init.xavier_normal_(nn.Parameter(torch.empty(5, 5)))
        self.copied = nn.Parameter(self.square.detach().clone())
        self.register_buffer("noise", torch.rand(3))
        self.constant = nn.Parameter(torch.full((2,), 7.0))


def test_unusual_constructors_keep_what_they_mean() -> None:
    found = []
    for ahead in (1, 5):
        with keyed(0) as draws:
            odd = Odd(ahead)
            draws.again(odd)
        found.append(odd)
    one, two = found
    for name in ("part", "square", "copied", "noise", "constant"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.copied, one.square)
    assert one.part[0].eq(0).all()
    assert one.part[1:3].ne(0).all()
    assert torch.equal(one.constant, torch.full((2,), 7.0))


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0, "embedding.weight") == 2138065490629681572
    assert seed_of(1, "embedding.weight") != seed_of(0, "embedding.weight")


def test_what_a_run_draws_after_its_model_is_the_same_beside_every_mechanism() -> None:
    after, first = {}, {}
    for name in ("full", "transformer_xl", "block_recurrent"):
        config = compose_training(
            [f"attention={name}", "task=mqar", "tracker=none", "model.dim=16", "model.output_dropout=0.1"]
        )
        options = options_of(check(config))
        parts = assemble(options, mechanism_of(options), build(options.task, "task"))
        after[name] = torch.rand(3)
        first[name] = parts.model.embedding.weight.detach()  # type: ignore[union-attr]
    assert all(torch.equal(after["full"], other) for other in after.values())
    assert all(torch.equal(first["full"], other) for other in first.values())


def test_both_halves_of_an_encoder_decoder_are_drawn_apart_and_alike_for_all() -> None:
    found = []
    for name in ("full", "longformer"):
        config = compose_training(
            ["task=reference", f"encoder.attention={name}", "tracker=none", "seed=5", "model.dim=16", "model.heads=2"]
        )
        options = options_of(check(config))
        found.append(assemble(options, mechanism_of(options), build(options.task, "task")).model)
    one, two = (dict(model.named_parameters()) for model in found)
    for name in one.keys() & two.keys():
        assert torch.equal(one[name], two[name]), name
    assert not torch.equal(one["encoder.embedding.weight"], one["decoder.embedding.weight"])
