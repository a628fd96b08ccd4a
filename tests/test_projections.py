"""A projection is called as the module that stands in its place: adapters, hooks, pruned and quantised layers count."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from recorded import RECORDED
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import attention_zoo as zoo
from attention_zoo.integrations.multihead import MultiheadAttention
from attention_zoo.registry import recipe

DIM = 16


class Adapter(nn.Module):
    """A low-rank adapter as libraries make them: the layer's weight and bias stay in sight, forward adds something."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(4, base.in_features) / 2)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) / 2)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {**recipe(name)[0].tiny, **options}
    return zoo.build(name, dim=DIM, heads=2, **options).double().eval()


def parts(name: str) -> list[str]:
    found = [part for part, module in build(name).named_children() if isinstance(module, nn.Linear)]
    return [part for part in found if not part.endswith("_global")]


CASES = [(name, part) for name in RECORDED for part in parts(name)]


def adapted(name: str, part: str) -> tuple[Any, Any, Adapter]:
    """A layer with an adapter around one projection, and one whose matrix says the same."""
    layer = build(name)
    adapter = Adapter(getattr(layer, part)).double()
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(merged, part).weight += adapter.b @ adapter.a
    setattr(layer, part, adapter)
    return layer, merged, adapter


def gradients(layer: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x).hidden
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize(("name", "part"), CASES)
def test_an_adapter_is_worth_its_matrix(name: str, part: str) -> None:
    """In outputs and in the gradients of the input, the layer and the adapter."""
    layer, merged, adapter = adapted(name, part)
    x = torch.randn(2, 23, DIM, dtype=torch.float64)
    (out, dx), (expected, expected_dx) = gradients(layer, x), gradients(merged, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dx, expected_dx)
    matrix = getattr(merged, part).weight.grad
    torch.testing.assert_close(adapter.base.weight.grad, matrix)
    torch.testing.assert_close(adapter.a.grad, adapter.b.T @ matrix)
    torch.testing.assert_close(adapter.b.grad, matrix @ adapter.a.T)


@pytest.mark.parametrize(("name", "part"), CASES)
def test_an_adapter_is_there_in_decoding(name: str, part: str) -> None:
    layer, merged, _ = adapted(name, part)
    x, tokens = torch.randn(2, 23, DIM, dtype=torch.float64), zoo.Tokens.all_valid(2, 23)
    with torch.no_grad():
        state = layer(x[:, :22], tokens.cut(slice(0, 22)), state=layer.initial_state(2)).state
        out = layer(x[:, 22:], tokens.cut(slice(22, 23)), state=state)
        torch.testing.assert_close(out.hidden, merged(x).hidden[:, 22:])


@pytest.mark.parametrize(("name", "part"), CASES)
def test_hooks_fire_and_may_change_what_they_see(name: str, part: str) -> None:
    layer, silent = build(name), build(name)
    for parameter in getattr(silent, part).parameters():
        nn.init.zeros_(parameter)
    getattr(layer, part).register_forward_hook(lambda module, given, out: out * 0)
    x = torch.randn(2, 23, DIM, dtype=torch.float64)
    for out, expected in zip(gradients(layer, x), gradients(silent, x)):
        torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, :1]).hidden, silent(x[:, :1]).hidden)


@pytest.mark.parametrize("way", ["pruned", "parametrised", "another forward"])
@pytest.mark.parametrize(("name", "part"), CASES)
def test_changed_layers_train(name: str, part: str, way: str) -> None:
    """Two steps: what stands for the weight is made anew for each."""
    layer, plain = build(name), build(name)
    module = getattr(layer, part)
    if way == "pruned":
        prune.l1_unstructured(module, "weight", amount=0.5)
    elif way == "parametrised":
        parametrize.register_parametrization(module, "weight", Doubled())
    else:
        module.forward = lambda x: 2 * nn.functional.linear(x, module.weight, module.bias)
    x = torch.randn(2, 23, DIM, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gradients(layer, x)
        optimizer.step()
    ours = dict(layer.named_parameters())
    for key, parameter in plain.named_parameters():
        parameter.data.copy_(ours.get(key, parameter))
    same = getattr(plain, part)
    if way == "pruned":
        same.weight.data.copy_(module.weight_orig * module.weight_mask)
    elif way == "parametrised":
        same.weight.data.copy_(2 * module.parametrizations.weight.original)
    else:
        for parameter in same.parameters():
            parameter.data *= 2
    assert not torch.equal(same.weight, getattr(build(name), part).weight)
    for out, expected in zip(gradients(layer, x), gradients(plain, x)):
        torch.testing.assert_close(out, expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("around", ["checkpoint", "compile", "reversible", "autocast"])
def test_an_adapter_of_keys_under_what_recomputes(around: str) -> None:
    """Transformer-XL goes through the adapter's graph twice."""
    if around == "reversible":
        options: dict[str, Any] = {"vocab": 9, "dim": DIM, "heads": 2, "depth": 2, "positions": "relative"}
        torch.manual_seed(0)
        model = zoo.Transformer(attention="transformer_xl", reversible=True, **options).double()
        attention: Any = model.stack.attentions[0]
        attention.to_k = adapter = Adapter(attention.to_k).double()
        ids = torch.randint(0, 9, (2, 11))
        found = []
        for recompute in (True, False):
            model.stack.recompute = recompute
            model.zero_grad()
            model(ids).logits.square().sum().backward()
            found.append(adapter.a.grad)
        torch.testing.assert_close(*found)
        return
    layer, merged, adapter = adapted("transformer_xl", "to_k")
    x = torch.randn(2, 23, DIM, dtype=torch.float64)
    if around == "autocast":
        layer, merged, x = layer.float(), merged.float(), x.float()
        with torch.autocast("cpu", torch.bfloat16):
            (out, dx), (expected, expected_dx) = gradients(layer, x), gradients(merged, x)
        assert (out - expected).norm() < 0.05 * expected.norm()
        assert (dx - expected_dx).norm() < 0.05 * expected_dx.norm()
        return
    ways = {
        "checkpoint": lambda: lambda x: checkpoint(layer, x, use_reentrant=False),
        "compile": lambda: torch.compile(layer, backend="eager"),
    }
    (out, dx), (expected, expected_dx) = gradients(ways[around](), x), gradients(merged, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(adapter.b.grad, merged.to_k.weight.grad @ adapter.a.T)


def test_absorbed_says_why_it_cannot() -> None:
    layer, _, _ = adapted("transformer_xl", "to_v")
    layer.kernel = "absorbed"
    with torch.no_grad(), pytest.raises(zoo.Unsupported, match="to_k, to_v and to_r, one of which is wrapped"):
        layer(torch.randn(1, 1, DIM, dtype=torch.float64))


def test_an_adapter_may_stand_in_the_embeddings_place() -> None:
    """Whose widths and token types nobody reads any more."""

    class Around(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, *given: Any) -> Tensor:
            return 2 * self.base(*given)

    model = zoo.Transformer(
        attention="full", vocab=37, dim=DIM, heads=2, embedding={"types": 2}, positions="none", pre_norm=False
    ).eval()
    ids, types = torch.randint(0, 37, (2, 9)), torch.randint(0, 2, (2, 9))
    expected = model.stack(2 * model.embedding(ids, None, types)).hidden
    model.embedding = Around(model.embedding)  # type: ignore[assignment]
    torch.testing.assert_close(model(ids, types=types).hidden, expected)
    torch.testing.assert_close(model(ids, types=types, state=model.initial_state(2)).hidden, expected)


@pytest.mark.parametrize("name", RECORDED)
def test_a_quantised_model_runs_carries_a_state_and_writes(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.Transformer(
        attention={"name": name, **recipe(name)[0].tiny}, vocab=37, dim=DIM, depth=2, heads=2, short_conv=2
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move this function elsewhere
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.stack.attentions[0].to_v.weight, Tensor)
    ids = torch.randint(0, 37, (2, 23))
    with torch.no_grad():
        whole = quantised(ids).logits
        state = quantised.initial_state(2)
        first = quantised(ids[:, :20], state=state)
        rest = quantised(ids[:, 20:], state=first.state).logits
        exact = model(ids).logits
    if name != "reformer":  # whose buckets may flip
        assert (whole - exact).norm() < 0.2 * exact.norm()
        # what is quantised with the scale of a call differs from call to call
        assert (rest - whole[:, 20:]).norm() < 0.2 * whole[:, 20:].norm()
    assert zoo.generate(quantised, ids, steps=3, greedy=True).shape == (2, 3)


@pytest.mark.parametrize("need_weights", [False, True])
def test_an_adapter_in_the_drop_in_counts_with_weights_too(need_weights: bool) -> None:
    """torch's own code would multiply by the base layer's matrix."""
    plain = MultiheadAttention(DIM, 2, batch_first=True, attention="full").eval()
    layer = copy.deepcopy(plain)
    adapter = Adapter(layer.out_proj)
    layer.out_proj = adapter  # type: ignore[assignment]
    with torch.no_grad():
        plain.out_proj.weight += adapter.b @ adapter.a
    x = torch.randn(2, 7, DIM)
    out, weights = layer(x, x, x, need_weights=need_weights)
    expected, expected_weights = plain(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert layer.out_proj is adapter
    out.square().sum().backward()
    assert adapter.b.grad is not None
    assert adapter.b.grad.abs().sum() > 0
