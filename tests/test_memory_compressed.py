"""What is particular to memory-compressed attention: what is seen when, what waits, and the layers beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer
from attention_zoo.attention.memory_compressed import MemoryCompressed
from attention_zoo.attention.memory_compressed_local import LocalBlocks
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.pooled import pooled
from attention_zoo.model.state import state_bytes
from attention_zoo.ops.pattern.key_set import Keys
from attention_zoo.ops.pattern.several import attend_to_several
from attention_zoo.testing import contract_checks
from attention_zoo.testing.case import close, feed


def build(**options: Any) -> MemoryCompressed:
    torch.manual_seed(0)
    layer = MemoryCompressed(**{"dim": 16, "heads": 2, "compression": 3, **options})
    with torch.no_grad():
        for null in (layer.null_key, layer.null_value):
            null.normal_()
    return layer.double().eval()


def sees(layer: MemoryCompressed, length: int) -> Tensor:
    """Bool [L, L]: whether the output at i depends on the hidden state at j, beyond its own query."""
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))
    found = torch.autograd.functional.jacobian(lambda v: layer.attend(q, k, v).sum((0, 1, 3)), v)
    return found.abs().sum((1, 2, 4)) > 0


@pytest.mark.parametrize("compression", [1, 3, 4])
def test_a_group_is_seen_once_its_last_token_is_there(compression: int) -> None:
    found = sees(build(compression=compression), 14)
    for i in range(14):
        complete = (i + 1) // compression * compression
        assert found[i].nonzero().flatten().tolist() == list(range(complete)), f"token {i}"


@pytest.mark.parametrize("length", [1, 2, 7, 9])
def test_two_sided_all_see_all_the_last_group_too(length: int) -> None:
    assert bool(sees(build(causal=False), length).all())


def test_before_the_first_group_is_complete_the_null_value_is_the_output() -> None:
    layer = build()
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    out = layer.attend(q, k, v)
    null = layer.null_value.view(1, 2, 1, 8)
    close(out[:, :, :2], null.expand(2, 2, 2, 8), "the first two tokens")
    assert not torch.allclose(out[:, :, 2:3], null)


def test_the_null_learns_and_starts_at_zero() -> None:
    layer = MemoryCompressed(dim=16, heads=2)
    assert not bool(layer.null_key.any() | layer.null_value.any())
    layer(torch.randn(1, 9, 16)).hidden.square().sum().backward()
    for null in (layer.null_key, layer.null_value):
        assert null.grad is not None
    assert bool(layer.null_value.grad.any())


def test_the_convolution_is_that_of_torch() -> None:
    layer = build(kv_heads=1)
    k = torch.randn(2, 1, 12, 8, dtype=torch.float64)
    groups = pooled(Layout.plain(2, 12), 3)
    expected = layer.compress(k[:, 0].transpose(1, 2)).transpose(1, 2)[:, None]
    for found in layer._convolved(torch.cat([k, k], 1), groups):  # of keys, and of values
        close(found, expected, "the convolution")


def test_the_state_holds_groups_and_what_waits() -> None:
    layer, x = build(), torch.randn(1, 100, 16, dtype=torch.float64)
    with torch.no_grad():
        _, state = feed(layer, x, Tokens.all_valid(1, 100), list(range(1, 100)))
    assert state.columns.filled == 33
    assert state.waiting.filled == 1
    close(state.waiting.held[0], layer._heads(layer.to_k(x[:, -1:])), "the key that waits")
    full = zoo.build("full", dim=16, heads=2).double()
    whole = full(x, Tokens.all_valid(1, 100), state=full.initial_state(1)).state
    assert state_bytes(state) < state_bytes(whole)


def test_what_an_ended_document_left_waiting_is_never_completed() -> None:
    """Two tokens of one document, then one of the next: no group."""
    layer = build()
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    tokens = Tokens.of(torch.ones(1, 3, dtype=torch.bool), document=torch.tensor([[0, 0, 1]]))
    with torch.no_grad():
        state = layer(x, tokens, state=layer.initial_state(1)).state
    assert state.columns.filled == 0
    assert state.waiting.tokens.document.tolist() == [[1]]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_partial_groups_hold_every_token_once(size: int) -> None:
    valid = torch.rand(4, 23, generator=torch.Generator().manual_seed(size)) < 0.7
    document = (torch.arange(23) // 9).expand(4, 23)
    layout = Layout.of(Tokens.of(valid, None, document))
    groups = pooled(layout, size, partial=True)
    x = torch.arange(1.0, 24).expand(4, 23)
    taken = groups.take(x[..., None])[..., 0]
    for row in range(4):
        kept = taken[row][groups.ends.valid[row]]
        assert sorted(kept[kept > 0].tolist()) == x[row][valid[row]].tolist()


def test_keys_that_are_no_tokens_are_seen_by_all() -> None:
    """With a learned weight, beside tokens, against a plain softmax; in every document."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 150, 4, generator=g, dtype=torch.float64) for _ in range(3))
    null = [torch.randn(2, 2, 3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    weight = torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    tokens = Tokens.of(torch.ones(2, 150, dtype=torch.bool), document=(torch.arange(150) // 70).expand(2, 150))
    layout = Layout.of(tokens)
    out = attend_to_several(q, layout, [Keys(*null, None, weight=weight), Keys(k, v, layout)], scale=1, causal=True)
    seen = (tokens.document[:, :, None] == tokens.document[:, None]).tril()
    scores = torch.cat([q @ null[0].mT + weight[:, None, None], (q @ k.mT).masked_fill(~seen[:, None], -torch.inf)], -1)
    expected = scores.softmax(-1) @ torch.cat([null[1], v], 2)
    close(out, expected, "keys that are no tokens")
    for found, wanted in zip(*(torch.autograd.grad(y.square().sum(), [*null, weight]) for y in (out, expected))):
        close(found, wanted, "their gradients", 1e-11)


@pytest.mark.parametrize(
    "check",
    [check for check in contract_checks("memory_compressed.local") if not check.slow and check.name in {
        "fast_equals_slow", "any_cut_equals_one_call", "a_step_costs_the_same_at_any_length", "states_grow_as_declared",
        "steps_that_do_not_simply_go_on", "the_future_cannot_be_seen",
    }],
    ids=str,
)  # fmt: skip
def test_local_blocks_keep_the_contract(check: Any) -> None:
    check()


def test_blocks_are_of_256_tokens_and_do_not_overlap() -> None:
    layer = LocalBlocks(dim=16, heads=2, causal=False)
    assert layer.block == 256
    tokens = Tokens.all_valid(1, 600)
    seen = layer.bias(tokens, tokens)[0, 0] == 0
    assert torch.equal(seen, torch.block_diag(*(torch.ones(n, n) for n in (256, 256, 88))).bool())


def test_the_stack_of_the_paper() -> None:
    """L M L M L, which decodes as it trains and is blind to the future."""
    torch.manual_seed(0)
    listed = [{"name": "memory_compressed.local", "block": 4}, "memory_compressed"]
    model = Transformer(attention=listed, vocab=11, dim=16, depth=5, heads=2).double().eval()
    names = [layer.name for layer in model.stack.attentions]
    assert names == ["memory_compressed.local", "memory_compressed"] * 2 + ["memory_compressed.local"]
    ids = torch.randint(11, (2, 20))
    with torch.no_grad():
        whole, state, found = model(ids).hidden, model.initial_state(2), []
        for column in range(20):
            out = model(ids[:, column : column + 1], state=state)
            state = out.state
            found.append(out.hidden)
        close(torch.cat(found, 1), whole, "step by step")
        changed = ids.clone()
        changed[:, 13:] = (ids[:, 13:] + 1) % 11
        assert torch.equal(model(changed).hidden[:, :13], whole[:, :13])


@pytest.mark.parametrize("compression", [0, 1025, 2.5])
def test_wrong_compressions_are_refused(compression: Any) -> None:
    with pytest.raises(ValueError, match=rf"compression must be .*, got {compression}"):
        MemoryCompressed(dim=16, heads=2, compression=compression)


def test_wrong_operands_are_refused() -> None:
    x = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"q must be \[batch, 2, length, 8\] and k, v \[batch, 2, keys, 8\] with"):
        build().attend(x, x[:, :, :3], x)
