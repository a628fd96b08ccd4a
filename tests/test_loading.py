"""A model is what its options and its state dict say: built on the meta device and filled, in whatever dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer
from attention_zoo.model.mechanisms import POSITIONS
from attention_zoo.registry import recipe

VOCAB = 37


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every backend with every position scheme that it takes, and with what makes it hold more."""
    for name in zoo.available():
        own = recipe(name)[0].declared.positions
        for scheme in POSITIONS:
            if scheme in own or scheme not in ("rotary", "alibi", "relative"):
                yield name, {"positions": scheme}
    yield "longformer", {"dilation": [1, 2]}
    yield "longformer", {"dilation": 2, "positions": "alibi"}
    yield "bigbird", {"extra_global_tokens": 2}
    yield "bigbird", {"plan": "reference", "causal": False}
    yield "reformer.local", {}
    yield "reformer.local", {"fill": 6, "causal": False}
    yield "reformer", {"hash_seed": 3}
    yield "transformer_xl", {"initial_memory": "zeros"}
    yield "transformer_xl", {"clamp_length": 4, "untie_r": True}
    yield "full", {"reversible": True, "short_conv": 3}
    yield "full", {"embedding": {"cutoffs": [10, 20], "divide": 2}}
    yield "full", {"embedding": {"types": 2, "normed": True}, "norm": "rms", "feed_forward": "swiglu"}


VARIANTS = list(variants())
OF_MODEL = ("positions", "causal", "reversible", "short_conv", "embedding", "norm", "feed_forward")


def build(name: str, options: dict[str, Any]) -> Transformer:
    torch.manual_seed(0)
    own = {key: value for key, value in options.items() if key not in OF_MODEL}
    entry = {"name": name, **recipe(name)[0].tiny, **own}
    rest = {key: value for key, value in options.items() if key in OF_MODEL}
    return Transformer(
        attention=entry, vocab=VOCAB, dim=16, depth=2, heads=2, ff_mult=2, max_length=64, **rest
    ).eval()  # fmt: skip


def logits(model: Transformer) -> Tensor:
    ids = torch.randint(0, VOCAB, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_nothing_is_held_that_no_state_dict_says(name: str, options: dict[str, Any]) -> None:
    model = build(name, options)
    held = {key for key, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    assert held == set(model.state_dict())


@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_model_built_on_the_meta_device_is_what_it_loads(name: str, options: dict[str, Any], way: str) -> None:
    model = build(name, options)
    with torch.device("meta"):
        empty = build(name, options)
    if way == "assign":
        empty.load_state_dict(model.state_dict(), assign=True)
    else:
        empty.to_empty(device="cpu")
        for tensor in empty.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(empty), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_nothing_to_a_model(name: str, options: dict[str, Any], default: torch.dtype) -> None:
    model = build(name, options)
    expected = logits(model)
    torch.set_default_dtype(default)
    try:
        found = logits(model)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sinusoids_are_as_exact_as_the_model() -> None:
    model = build("full", {"positions": "sinusoidal"}).double()
    nn.init.zeros_(model.embedding.weight)
    position = torch.arange(9, dtype=torch.float64)[:, None]
    step = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    expected = torch.cat([(position * step).sin(), (position * step).cos()], -1)
    places = model._embed(torch.zeros(1, 9, dtype=torch.long), None, None)[0]
    torch.testing.assert_close(places, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("heads", [2, 3])
def test_slopes_are_as_exact_as_the_layer(heads: int) -> None:
    layer: Any = zoo.build("full", dim=4 * heads, heads=heads, positions="alibi").double()
    tokens = Tokens.all_valid(1, 9)
    slope = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs().double()
    found = layer.position_bias(tokens, tokens)[0]
    torch.testing.assert_close(found, -slope[:, None, None] * distance, rtol=1e-15, atol=0)
    assert layer.bfloat16().position_bias(tokens, tokens).dtype == torch.bfloat16


def test_constants_of_a_fake_call_do_not_outlive_it() -> None:
    """What is kept between calls must be real tensors, and no real one may meet a fake one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer: Any = zoo.build("longformer", dim=16, heads=2, window=3, dilation=[1, 2], positions="alibi")
    found = []
    for _ in range(2):
        with FakeTensorMode():
            fake = Tokens.all_valid(1, 11)
            assert layer.scores_bias(fake, fake).shape == (1, 2, 11, 11)
        tokens = Tokens.all_valid(1, 11)
        found.append(layer.scores_bias(tokens, tokens))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert type(found[0]) is Tensor
