"""Constants of a mechanism: no operator makes them on CPU, whatever mode they are first asked for in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as zoo
from attention_zoo import Tokens, constants
from attention_zoo.constants import constant
from attention_zoo.positions import alibi

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("full", {"positions": "alibi"}),
    ("bigbird", {"positions": "alibi", "block": 4}),
    ("longformer", {"positions": "alibi", "window": 3, "dilation": [1, 2, 1], "global_projections": "shared"}),
]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    constants._kept.cache_clear()
    alibi._slopes.cache_clear()


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return zoo.build(name, dim=24, heads=3, **options).eval()


def slopes(heads: int, dtype: torch.dtype) -> Tensor:
    """By operators, as the layer's definition says."""
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return slope.to(torch.promote_types(dtype, torch.float32)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_a_first_call_runs_what_every_later_one_does(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = build(name, options).to(dtype)
    x = torch.randn(1, 24, 24).to(dtype)
    layer(x)  # plans of a pattern may be kept, too
    constants._kept.cache_clear()
    counts = []
    for _ in range(2):
        with Counted() as counted, torch.no_grad():
            layer(x)
        counts.append(counted.names)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 2, 3, 7, 8, 12, 100])
def test_slopes_are_those_of_the_definition_bit_for_bit(heads: int, dtype: torch.dtype) -> None:
    scheme = alibi.Alibi(heads=heads, head_width=2)
    found = constant(scheme.slopes, like=torch.ones(1), dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, slopes(heads, dtype))
    assert constant(scheme.slopes, like=torch.ones(2), dtype=dtype) is found


def test_numbers_that_lie_in_the_middle_are_rounded_as_torch_rounds_them() -> None:
    values = [1 + n / 256 for n in range(256)] + [1 + n / 4096 for n in range(4096)] + [-1e-40, 0.0, -6e4]
    for dtype in DTYPES:
        expected = torch.tensor(values, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
        assert torch.equal(constant(values, like=torch.ones(1), dtype=dtype), expected)


def test_a_column_of_whole_numbers() -> None:
    found = constant((1, 2, 2**40), like=torch.ones(1), dtype=torch.long, axes=3)
    assert found.dtype == torch.long
    assert found.tolist() == [[[1]], [[2]], [[2**40]]]


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("mode", ["fake", "meta", "inference", "counted", "compile"])
def test_it_does_not_matter_where_a_layer_was_built_and_called_first(
    name: str, options: dict[str, Any], mode: str
) -> None:
    expected = build(name, options)
    x = torch.randn(1, 24, 24, requires_grad=True)
    hidden = expected(x).hidden
    nothing_of_it = {key for key, _ in (*expected.named_parameters(), *expected.named_buffers())}
    assert nothing_of_it == set(expected.state_dict())
    constants._kept.cache_clear()
    alibi._slopes.cache_clear()
    if mode == "fake":
        with FakeTensorMode():
            fake = build(name, options)
            one = Tokens.all_valid(1, 24)
            assert fake.scheme.bias(one, one, torch.float32).shape == (1, 3, 24, 24)
        slopes_made = fake.scheme.slopes
    elif mode == "meta":
        with torch.device("meta"):
            empty = build(name, options)
        empty.to_empty(device="cpu").load_state_dict(expected.state_dict())
        assert torch.equal(empty(x).hidden, hidden)
        slopes_made = empty.scheme.slopes
    else:
        layer = build(name, options)
        around: Any = {"inference": torch.inference_mode, "counted": Counted}.get(mode, torch.no_grad)
        call = torch.compile(layer, backend="eager", fullgraph=True) if mode == "compile" else layer
        with around():
            assert torch.equal(call(x).hidden, hidden)
        slopes_made = layer.scheme.slopes
    assert slopes_made == expected.scheme.slopes
    again = expected(x)
    assert torch.equal(again.hidden, hidden)
    again.hidden.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
