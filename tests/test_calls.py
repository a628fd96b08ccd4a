"""What a call may bring: wrong arguments are refused in one line that names them, by layers and models alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import RECORDED
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as zoo
from attention_zoo.integrations.multihead import MultiheadAttention

VALID = torch.ones(2, 6, dtype=torch.bool)
TOKENS = zoo.Tokens.of(VALID)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"valid": [[True]]}, "valid must be a bool tensor"),
        ({"start": -1}, "start must be an integer from 0"),
        ({"start": 1.5}, "start must be an integer from 0"),
        ({"start": True}, "start must be an integer from 0"),
        ({"start": torch.tensor([1, 2, 3])}, "start must be an integer, or a tensor of 2 integers, got torch.int64 of"),
        ({"start": torch.tensor([1.0, 2.0])}, "start must be an integer, or a tensor of 2 integers, got torch.float32"),
        ({"document": "x"}, "document must be a tensor"),
        ({"is_global": 3}, "is_global must be a tensor"),
        ({"is_global": VALID.to("meta")}, "is_global must be where valid is, on cpu, got meta"),
    ],
)
def test_tokens(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        zoo.Tokens.of(**{"valid": VALID, **given})


def test_where_a_row_starts_may_be_a_list():
    assert zoo.Tokens.of(VALID, start=[1, 2]).position[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("name", RECORDED)
def test_a_layer(name: str):
    layer, x = zoo.build(name, dim=8, heads=2), torch.randn(2, 6, 8)
    other = zoo.build("full" if name == "transformer_xl" else "transformer_xl", dim=8, heads=2)
    wide = zoo.build(name, dim=16, heads=2)
    for given, said in (
        ({"x": [[1]]}, "x must be a dense tensor of floats"),
        ({"x": torch.ones(2, 6, 8, dtype=torch.long)}, "x must be a dense tensor of floats"),
        ({"tokens": TOKENS._replace(valid=VALID.float())}, "valid must be bool"),
        ({"tokens": zoo.Tokens.of(VALID.to("meta"))}, "tokens must be where the input is"),
        ({"state": "x"}, "state must be of"),
        ({"state": other.initial_state(2)}, f"state must {'be of' if name == 'reformer' else 'hold keys of shape'}"),
        ({"state": layer.initial_state(3)}, "state must hold keys of shape"),
        ({"state": wide.initial_state(2)}, "state must hold keys of shape"),
        ({"source": "x"}, "source must be a Source"),
    ):
        with pytest.raises(ValueError, match=said):
            layer(**{"x": x, "tokens": TOKENS, **given})
    for size in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 0"):
            layer.initial_state(size)


def test_a_kernel_without_a_name_is_none_of_those_there_are():
    with pytest.raises(ValueError, match="kernel= is not supported"):
        zoo.build("full", dim=8, heads=2).attend(*(torch.randn(2, 2, 6, 4) for _ in range(3)), kernel="")


def test_a_model():
    model, ids = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2), torch.zeros(2, 6, dtype=torch.long)
    deep = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2, depth=3)
    for given, said in (
        ({"ids": [[1]]}, "ids must be integers"),
        ({"ids": VALID}, "ids must be integers"),
        ({"state": 3}, "state must be of this model"),
        ({"state": model.initial_state(5)}, "state must have as many rows as ids, 2, got 5"),
        ({"state": deep.initial_state(2)}, "state must be of a model with 2 blocks, got one of 3"),
        ({"fresh": [1], "state": model.initial_state(2)}, "fresh must be bool of shape"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**{"ids": ids, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ids": [[1]]}, "ids must be integers"),
        ({"valid": VALID[:, :3]}, "valid must be bool of shape"),
        ({"temperature": 1e-300}, "temperature must be from 1e-30"),
        ({"temperature": 10**400}, "temperature must be from 1e-30"),
        ({"temperature": True}, "temperature must be above 0, got True"),
        ({"eos": 1.5}, "eos must be an integer"),
        ({"eos": 10**30}, "eos must be at most"),
    ],
)
def test_writing(given: dict[str, Any], said: str):
    model = zoo.Transformer(attention="full", vocab=11, dim=8, heads=2)
    with pytest.raises(ValueError, match=said):
        zoo.generate(model, **{"ids": torch.zeros(2, 6, dtype=torch.long), "steps": 2, **given})


@pytest.mark.parametrize("name", zoo.available())
@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, "meta"])
def test_vectors_that_a_layers_weights_cannot_take(name: str, wrong: Any):
    layer = zoo.build(name, dim=16, heads=2)
    rule = "where the layer's weights are, on cpu" if wrong == "meta" else "of the dtype of the layer's weights"
    with pytest.raises(ValueError, match=rf"^x must be {rule}.*, got \S+$"):
        layer(torch.ones(2, 6, 16).to(wrong))
    assert layer.double()(torch.ones(2, 6, 16, dtype=torch.float64)).hidden.dtype == torch.float64


def test_the_vectors_of_a_source_are_of_the_same_kind():
    layer = zoo.build("full", dim=16, heads=2, causal=False, cross=True)
    with pytest.raises(ValueError, match=r"^source.hidden must be of the dtype of the layer's weights, torch.float32"):
        layer(torch.ones(2, 6, 16), source=zoo.Source(torch.ones(2, 6, 16).half(), TOKENS))


@pytest.mark.parametrize("name", zoo.available())
def test_autocast_takes_what_torch_can_convert(name: str):
    layer = zoo.build(name, dim=16, heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer(torch.ones(2, 6, 16, dtype=dtype)).hidden.isfinite().all()
        with pytest.raises(ValueError, match=r"^x must be of the dtype of the layer's weights"):
            layer(torch.ones(2, 6, 16, dtype=torch.float64))


def test_projections_that_convert_what_they_get_are_left_alone():
    layer: Any = zoo.build("full", dim=16, heads=2)
    expected = layer(torch.ones(2, 6, 16)).hidden
    for part in (layer.to_q, layer.to_k, layer.to_v):
        part.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    layer.to_out.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    assert torch.equal(layer(torch.ones(2, 6, 16, dtype=torch.float64)).hidden, expected)


@pytest.mark.parametrize("attention", ["full", "longformer"])
def test_vectors_that_torchs_drop_in_cannot_take(attention: str):
    layer = MultiheadAttention(16, 2, batch_first=True, attention=attention)
    x = torch.ones(2, 6, 16)
    for wrong, rule in (("meta", "where the layer's weights are"), (torch.float64, "of the dtype of the layer's")):
        with pytest.raises(ValueError, match=f"^query must be {rule}"):
            layer(x.to(wrong), x.to(wrong), x.to(wrong))
    with pytest.raises(ValueError, match=r"^value must be of the dtype"):
        layer(x, x, x.double())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16])
def test_ids_that_an_embedding_does_not_take(dtype: torch.dtype):
    model = zoo.Transformer(attention="full", vocab=9, dim=16, heads=2, embedding={"types": 2})
    ids = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"^ids must be int64 or int32, as an embedding takes them, got {dtype}$"):
        model(ids.to(dtype))
    with pytest.raises(ValueError, match=r"^types must be int64 or int32"):
        model(ids, types=ids.to(dtype))
    with pytest.raises(ValueError, match=r"^ids must be where the model's weights are, on cpu, got meta$"):
        model(ids.to("meta"))
    assert torch.equal(model(ids.int()).hidden, model(ids).hidden)


@pytest.mark.parametrize("start", [torch.tensor(-1), torch.tensor([0, -2]), torch.tensor([2**60])])
def test_a_row_does_not_start_where_no_token_is(start: torch.Tensor):
    with pytest.raises(ValueError, match=r"^start must be an integer from 0 to \d+, or one for each of 2 rows, got "):
        zoo.Tokens.of(VALID, start=start)


def test_where_rows_start_is_checked_without_an_operator():
    """Each decoding step goes through it."""
    start, seen = torch.tensor([3, 4]), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        assert zoo.Tokens.of(VALID, start=start).position[:, 0].shape == (2,)
    assert "cumsum" in seen
    assert not {"_local_scalar_dense", "lt", "any", "aminmax", "is_nonzero"} & set(seen)


@pytest.mark.parametrize("given", [None, 3, "model", {}, torch.nn.Linear(2, 2), zoo.build("full", dim=8, heads=1)])
def test_what_is_no_model_is_not_saved(given: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"^save needs a Transformer or .*, got {type(given).__name__}$"):
        zoo.save(given, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
