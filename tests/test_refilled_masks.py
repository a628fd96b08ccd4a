"""A caller may fill its masks again before backward: gradients stay those of the forward, a state keeps what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import VOCAB, entry, some_ids
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Source, Tokens
from attention_zoo.integrations.multihead import MultiheadAttention
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns

LENGTH = 29
LAYERS: dict[str, dict[str, Any]] = {
    "longformer": {},
    "longformer tiles": {"kernel": "tiles"},
    "longformer two-sided": {"causal": False},
    "full": {"kernel": "tiles"},
    "bigbird": {},
    "bigbird tiles": {"kernel": "tiles"},
    "transformer_xl": {},
    "transformer_xl gather": {"kernel": "gather"},
    "reformer": {"resample": False},
}


def batch(seed: int) -> Tokens:
    """Holes, padding on both sides, documents and a global token, in tensors that can be filled again."""
    draw = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, LENGTH, generator=draw) > 0.3
    document = (torch.rand(2, LENGTH, generator=draw) > 0.9).long().cumsum(1)
    return Tokens(*(field.clone() for field in Tokens.of(valid, document=document)))


def refill(tokens: Tokens, seed: int) -> None:
    """Every tensor of it gets the numbers of another batch, as a loader's buffers do."""
    for field, other in zip(tokens, batch(seed), strict=True):
        field.copy_(other)


def build(what: str) -> Any:
    name = what.split()[0]
    torch.manual_seed(1)
    layer = zoo.build(**entry(name, dim=16, heads=2, **LAYERS[what])).double()
    if name in ("longformer", "bigbird", "full"):
        layer.mark = _one_global(layer.mark)
    return layer


def _one_global(mark: Callable[[Tokens], Tokens]) -> Callable[[Tokens], Tokens]:
    return lambda tokens: mark(tokens._replace(is_global=tokens.is_global | (tokens.valid & (tokens.position == 2))))


@pytest.mark.parametrize("what", LAYERS)
def test_gradients_are_those_of_the_forwards_masks(what: str) -> None:
    layer = build(what)
    weights = [layer.to_out.weight, *(p for n, p in layer.named_parameters() if n in ("to_q.weight", "to_qk.weight"))]
    for seed in range(3):
        found = []
        for refilled in (False, True):
            tokens = batch(seed)
            x = torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
            keep = tokens.valid.clone()
            out = layer(x, tokens).hidden
            if refilled:
                refill(tokens, seed + 100)
            found.append(torch.autograd.grad((out * keep[..., None]).square().sum(), [x, *weights]))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_attend_holds_what_it_is_given(name: str) -> None:
    layer = build(name + (" tiles" if name != "full" else ""))
    q, k, v = torch.randn(3, 2, 2, LENGTH, 8, dtype=torch.float64).requires_grad_()
    found = []
    for refilled in (False, True):
        keys = batch(4)
        queries = keys.cut(slice(None))
        keep = keys.valid.clone()[:, None, :, None]
        out = layer.attend(q, k, v, queries, keys)
        if refilled:
            refill(keys, 5)
        found.append(torch.autograd.grad((out * keep).square().sum(), [q, k, v]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"reversible": True, "short_conv": 3}], ids=["plain", "reversible"])
def test_a_whole_model_and_what_it_recomputes(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    mixed = [entry("longformer", kernel="tiles"), entry("transformer_xl", kernel="gather")]
    model = zoo.Transformer(
        attention=mixed, vocab=VOCAB, dim=16, heads=2, depth=2, positions="none", **options
    ).double()
    ids = some_ids(2, LENGTH)
    found = []
    for refilled in (False, True):
        tokens = batch(6)
        keep = tokens.valid.clone()
        loss = model(ids, tokens).logits[keep].square().mean()
        if refilled:
            refill(tokens, 7)
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernel", ["sdpa", "tiles", "dense"])
def test_a_source_and_the_state_that_keeps_it(kernel: str) -> None:
    torch.manual_seed(3)
    layer = zoo.build("full", dim=16, heads=2, causal=False, cross=True, kernel=kernel).double()
    x, hidden = torch.randn(2, 3, 16).double(), torch.randn(2, LENGTH, 16).double().requires_grad_()
    found, steps = [], []
    for refilled in (False, True):
        tokens = batch(8)
        out = layer(x, source=Source(hidden, tokens)).hidden
        with torch.no_grad():
            state = layer(x, source=Source(hidden, tokens), state=layer.initial_state(2)).state
        if refilled:
            refill(tokens, 9)
        found.append(torch.autograd.grad(out.square().sum(), hidden)[0])
        steps.append(layer(x[:, :1], state=state).hidden)
    assert torch.equal(*found)
    assert torch.equal(*steps)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird", "transformer_xl", "reformer"])
def test_a_state_keeps_what_it_saw(name: str, gradients: bool) -> None:
    torch.manual_seed(4)
    options = {"resample": False} if name == "reformer" else {}
    model = zoo.Transformer(
        attention=entry(name, **options), vocab=VOCAB, dim=16, heads=2, depth=2, positions="none", short_conv=3
    ).double()
    ids, valid = some_ids(2, 9), torch.ones(2, 2, dtype=torch.bool)
    with torch.set_grad_enabled(gradients):
        found = []
        for refilled in (False, True):
            mask = valid.clone()
            state = model(ids[:, :2], Tokens.of(mask), state=model.initial_state(2)).state
            if refilled:
                mask[1] = False
            found.append(model(ids[:, 2:], state=state).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("what", ["full", "longformer tiles", "bigbird tiles", "transformer_xl gather"])
def test_a_states_own_tokens_are_not_changed_unnoticed(what: str) -> None:
    """They are handed out without a copy: backward says so, as torch does of what it saved."""
    name = what.split()[0]
    layer = zoo.build(**entry(name, dim=16, heads=2, **LAYERS[what])).double()
    x, tokens = torch.randn(2, 3, 16, dtype=torch.float64), Tokens.all_valid(2, 3)
    for first in (0, 2):  # nothing is forgotten in so few columns
        state = layer.initial_state(2)
        if first:
            state = layer(x[:, :first], tokens.cut(slice(0, first)), state=state).state
        out = layer(x[:, first:], tokens.cut(slice(first, 3)), state=state)
        out.hidden.sum().backward(retain_graph=True)  # nothing was changed yet
        columns = out.state if isinstance(out.state, Columns) else out.state.columns
        columns.ledger.fields.valid.fill_(False)
        with pytest.raises(RuntimeError, match=r"tokens of a state.*have been modified by an inplace operation"):
            out.hidden.sum().backward()


def test_torchs_drop_in() -> None:
    torch.manual_seed(5)
    attention = MultiheadAttention(16, 2, batch_first=True, attention="longformer", window=3, kernel="tiles").double()
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    found = []
    for refilled in (False, True):
        padding = ~batch(1).valid
        keep = ~padding
        out, _ = attention(x, x, x, key_padding_mask=padding, is_causal=True)
        if refilled:
            padding.copy_(~batch(2).valid)
        found.append(torch.autograd.grad(out[keep].square().sum(), list(attention.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_layout_is_a_copy_and_is_made_only_once() -> None:
    tokens = batch(0)
    layout = Layout.of(tokens)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(layout, tokens, strict=True))
    assert Layout.of(layout) is layout
    other: Tensor = batch(1).valid
    assert not isinstance(layout._replace(valid=other), Layout), "what comes in is somebody's"
