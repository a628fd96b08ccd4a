"""What a row says that a backend was given, against brute force: changed inputs, counted cells, loops."""

from typing import Any

import numpy as np
import pytest
import torch

import attention_zoo as zoo
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Tokens
from attention_zoo.measure.given import LONGEST, given_to, seen_by
from attention_zoo.model.transformer import Transformer
from attention_zoo.results.check import wrong_with
from attention_zoo.training.config import compose_training
from attention_zoo.training.run import run_training

L = 61
LAYER: dict[str, Any] = {"dim": 8, "heads": 2}
SIZES: dict[str, Any] = {"vocab": 32, "dim": 8, "depth": 2, "heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "longformer": {"window": 5},
    "bigbird": {"block": 4, "random": 1},
    "adaptive_span": {"limit": 9, "ramp": 2, "start": 3.0},
    "transformer_xl": {"segment_length": 8, "memory_length": 5},
    "compressive": {"segment_length": 6, "memory_length": 6, "compressed_length": 3, "ratio": 2},
    "reformer": {"chunk": 4, "rounds": 2},
    "block_recurrent": {"window": 4, "states": 3},
    "h_transformer_1d": {"block": 4},
    "memory_compressed": {"compression": 3},
}
EXACT = ("full", "longformer", "bigbird", "adaptive_span", "transformer_xl", "compressive", "memory_compressed")


def test_every_backend_is_here() -> None:
    assert set(OPTIONS) == set(zoo.available())


def changed(call: Any, length: int, width: int | None) -> np.ndarray:
    """The first token whose change changes each output, by changing one after the other in float64."""
    torch.manual_seed(0)
    x = torch.randn(1, length, width, dtype=torch.float64) if width else torch.randint(0, 16, (1, length))
    before = call(x)
    first = np.arange(length)
    for token in reversed(range(length)):
        other = x.clone()
        other[0, token] = other[0, token] + (torch.randn(width, dtype=torch.float64) if width else 1)
        moved = (call(other) != before).any(-1)[0].numpy()
        first = np.where(moved, np.minimum(first, token), first)
    return first


@pytest.mark.parametrize("name", sorted(OPTIONS))
@torch.no_grad()
def test_no_layer_depends_on_what_it_does_not_say(name: str) -> None:
    torch.manual_seed(0)
    layer = zoo.build(name, **LAYER, **OPTIONS[name]).double().eval()
    said = seen_by(layer, L).oldest
    assert said is not None
    found = changed(lambda x: layer(x).hidden, L, 8)
    assert (found >= said).all()
    if name in EXACT:
        assert (found == said).all()
    assert int((np.arange(L) - found).max()) == int((np.arange(L) - said).max()), "the farthest is reached"


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("reformer", "h_transformer_1d")])
def test_keys_are_the_cells_of_the_definition(name: str) -> None:
    layer = zoo.build(name, **LAYER, **OPTIONS[name])
    said = seen_by(layer, L).keys
    assert said is not None
    at = np.arange(L)
    if isinstance(layer, PatternAttention):
        tokens = layer.mark(Tokens.all_valid(1, L))
        expected = (layer.full_bias(tokens, tokens) > -torch.inf).double().mean((0, 1)).sum(-1).numpy()
    elif name == "transformer_xl":
        expected = np.array([sum(q // 8 * 8 - 5 <= k <= q for k in range(L)) for q in at])
    elif name == "compressive":
        expected = []  # type: ignore[assignment]
        for q in at:
            start = max(0, q // 6 * 6 - 6)
            start -= start % 2
            expected.append(min(3, start // 2) + q - start + 1)  # type: ignore[attr-defined]
    elif name == "block_recurrent":
        expected = np.array([min(q, 4) + 1 + 3 for q in at])
    else:
        expected = np.array([(q + 1) // 3 + 1 for q in at])
    assert np.allclose(said, expected)


def test_keys_of_hashing_and_of_groups() -> None:
    hashed = seen_by(zoo.build("reformer", **LAYER, **OPTIONS["reformer"]), L).keys
    assert hashed is not None
    assert list(hashed) == [min(2 * 2 * 4, q + 1) for q in range(L)]
    layer = zoo.build("h_transformer_1d", **LAYER, block=4)
    grouped = seen_by(layer, L).keys
    assert grouped is not None
    assert grouped.sum() == layer.pairs(L)
    assert list(grouped[:8]) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("name", "conv", "reach"),
    [
        ("longformer", 0, 10),
        ("longformer", 3, 14),
        ("transformer_xl", 0, 24),
        ("full", 3, L - 1),
        ("compressive", 3, None),
    ],
)
@torch.no_grad()
def test_the_reach_of_a_model_is_that_of_changed_tokens(name: str, conv: int, reach: int | None) -> None:
    torch.manual_seed(0)
    model = Transformer(attention={"name": name, **OPTIONS[name]}, short_conv=conv, positions="none", **SIZES)
    model.double().eval()
    said = given_to(model, L)
    found = int((np.arange(L) - changed(lambda ids: model(ids).logits, L, None)).max())
    assert said["reach"] >= found
    if name != "compressive":
        assert said["reach"] == found
    assert reach is None or found == reach or name == "transformer_xl"


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_all_facts_of_every_backend(name: str) -> None:
    model = Transformer(attention={"name": name, **OPTIONS[name]}, **SIZES)
    given = given_to(model, L)
    assert None not in given.values(), given
    assert 1 <= given["keys_mean"] <= given["keys_most"]
    assert given["length"] == L
    layer_flops = 2 * 8 * 8 * (3 if name == "reformer" else 4) * 2  # q, k, v, out; two layers
    if name in ("full", "longformer", "bigbird", "adaptive_span", "reformer"):
        pairs = given["keys_mean"] if name != "reformer" else model.stack.attentions[0].pairs(L) / L
        rest = 2 * 2 * (2 * 8 * 32) + 2 * 8 * 32  # feed-forward of two layers, head
        assert given["flops_per_token"] == pytest.approx(2 * 4 * 8 * pairs + layer_flops + rest, rel=1e-3)
    assert model.training, "as it was"


@pytest.mark.parametrize("name", zoo.wrappers())
def test_what_is_not_known_of_wrappers_is_not_said(name: str) -> None:
    given = given_to(Transformer(attention=name, **SIZES), 20)
    assert [given[key] for key in ("keys_mean", "keys_most", "layer_reach", "reach", "flops_per_token")] == [None] * 5
    assert given["positions"] == "sinusoidal"


def test_long_rows_are_counted_in_part() -> None:
    assert LONGEST == 16_384
    layer = zoo.build("longformer", dim=4, heads=1, window=3)
    keys, oldest = seen_by(layer, 1000)
    assert keys is not None
    assert oldest is not None
    assert keys.mean() == pytest.approx(4 - 6 / 1000)
    assert (np.arange(1000) - oldest).max() == 3


def test_a_row_says_what_its_backend_was_given(tmp_path: Any) -> None:
    words = ["attention=longformer", "attention.window=6", "task=mqar", "tracker=none", "model.dim=16", "batch=4"]
    words += ["steps=2", "device=cpu", "threads=1", "task.test_examples=32", "trainer.progress=none"]
    row = run_training(compose_training(words), tmp_path)
    assert row["status"] == "ok", row["error"]
    given = row["given"]
    assert given["options"] == {"window": 6}
    assert given["positions"] == "none"
    assert (given["layer_reach"], given["reach"]) == (6, 2 * 6 + 2 * 2)
    assert given["keys_most"] == 7
    assert given["keys_mean"] == pytest.approx(7 - 21 / 64)
    assert given["flops_per_token"] > 0
    assert given["state_bytes"] > 0
    assert given["length"] == 64
    assert row["regime"] == "steps"
    assert row["rates"] is None
    assert wrong_with(row) is None
    assert not row["notices"]
    hybrid = run_training(compose_training([*words[2:], "hybrid=[longformer,full]"]), tmp_path / "hybrid")
    assert hybrid["given"]["options"] == {"hybrid": ["longformer", "full"]}
    assert hybrid["given"]["reach"] == 63
    assert hybrid["given"]["keys_mean"] > 7
