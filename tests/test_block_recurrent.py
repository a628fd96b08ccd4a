"""Block-recurrent attention: the state is used, learns, stops where it is told to, and is what the paper says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.block_recurrent import reference
from torch import Tensor, nn
from turns import assert_within, flops_of

import attention_zoo as zoo
from attention_zoo.attention.block_recurrent import BlockRecurrent, BlockState
from attention_zoo.contract import Tokens
from attention_zoo.layout.blocks import turns
from attention_zoo.layout.host import Host
from attention_zoo.layout.layout import Layout
from attention_zoo.measure.flops import LinearFlops
from attention_zoo.measure.memory import peak_memory
from attention_zoo.model.state import state_bytes
from attention_zoo.model.transformer import Transformer
from attention_zoo.ops.pattern.one_of import attend_to_one_of
from attention_zoo.ops.softmax import tiles
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.testing.case import Case, close, feed, gradients, piece


def layer(**options: Any) -> BlockRecurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = zoo.build("block_recurrent", **{"dim": 16, "heads": 2, "window": 4, "states": 3, **options})
    assert isinstance(built, BlockRecurrent)
    return built.double()


def data(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASE = Case.of("block_recurrent")


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "lstm"}, {"gate": "lstm", "bias": False}, {"truncate": 1}, {"truncate": 2}, {"states": 1, "window": 1},
        {"window": 3, "positions": "rotary", "kv_heads": 1}, {"window": 40}, {"scale": -0.7}, {"scale": 0},
    ],
    ids=str,
)  # fmt: skip
def test_other_options_are_the_definition(options: dict[str, Any]) -> None:
    """Outputs and gradients, in every layout."""
    module = layer(**options)
    for name, tokens in CASE.layouts(23):
        x = data(23, 3).requires_grad_()
        fast, slow = module(x, tokens).hidden, reference(module, x, tokens)
        close(fast[tokens.valid], slow[tokens.valid], f"{options} {name}")
        expected = gradients(module, x, slow, tokens.valid)
        for of, grad in gradients(module, x, fast, tokens.valid).items():
            close(grad, expected[of], f"{options} {name}: gradient of {of}", 1e-11)


@pytest.mark.parametrize(("gate", "scores"), [("fixed", 1), ("lstm", 60)])
def test_turns_in_small_steps_are_the_same(gate: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries, or some rows, at once; grouped heads; documents that begin inside the call."""
    monkeypatch.setitem(tiles.SCORES, "cpu", scores)
    module = layer(gate=gate, heads=4, kv_heads=2, states=5)
    for name, tokens in CASE.layouts(13):
        x = data(13, 3).requires_grad_()
        fast, slow = module(x, tokens).hidden, reference(module, x, tokens)
        close(fast[tokens.valid], slow[tokens.valid], name)
        expected = gradients(module, x, slow, tokens.valid)
        for of, grad in gradients(module, x, fast, tokens.valid).items():
            close(grad, expected[of], f"{name}: gradient of {of}", 1e-11)


class Adapted(nn.Module):
    """A projection and something of low rank beside it, which is no `nn.Linear`."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.low = nn.Sequential(nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.low(x)
        return out


@pytest.mark.parametrize("name", ["state_q", "state_q_of_tokens", "state_k", "state_v", "state_out", "forget_gate"])
def test_what_stands_in_a_projections_place_has_its_effect(name: str) -> None:
    module = layer(gate="lstm", bias=False)
    setattr(module, name, Adapted(getattr(module, name)))
    x, tokens = data(13).requires_grad_(), Tokens.all_valid(2, 13)
    fast, slow = module(x, tokens).hidden, reference(module, x, tokens)
    close(fast, slow, "output")
    expected = gradients(module, x, slow, tokens.valid)
    for of, grad in gradients(module, x, fast, tokens.valid).items():
        close(grad, expected[of], f"gradient of {of}", 1e-11)


# --- the state is used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_the_first_steps_train_the_initial_state_and_the_gate(gate: str) -> None:
    """Freshly built, all that the state is made of gets a gradient from tokens far behind the first block."""
    module, x = layer(gate=gate, window=8), data(48)
    module(x).hidden[:, 40:].square().sum().backward()
    learns = ["initial", "identity", "state_q.weight", "state_q_of_tokens.weight", "state_k.weight", "state_v.weight",
              "state_out.weight", "to_q_of_state.weight"]  # fmt: skip
    learns += ["keep"] if gate == "fixed" else ["forget_gate.weight", "input_gate.weight"]
    for name, parameter in module.named_parameters():
        if name in learns:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert float(parameter.grad.norm()) > 1e-6, f"{name}: {float(parameter.grad.norm()):.1e}"


@pytest.mark.parametrize(("gate", "share"), [("fixed", 0.5), ("lstm", 0.73)])
def test_gates_are_open_from_the_start(gate: str, share: float) -> None:
    """sigmoid(0) of the old state is kept, or sigmoid(1); the new enters with the rest, or with sigmoid(-1)."""
    module = layer(gate=gate, dim=64)
    if gate == "fixed":
        kept = module.keep.sigmoid()
    else:
        found = torch.randn(100, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        kept = (module.forget_gate(found) + 1).sigmoid()
        assert float((module.input_gate(found) - 1).sigmoid().detach().mean()) == pytest.approx(1 - share, abs=0.05)
    assert float(kept.detach().mean()) == pytest.approx(share, abs=0.05)


def test_what_left_the_window_is_seen_through_the_state_alone() -> None:
    """Beyond the window a token matters through the state; and not at all before its block is complete."""
    module, x = layer(), data(24)
    other = x.clone()
    other[:, 1] += 1
    before, after = (module(each).hidden.detach() for each in (x, other))
    assert bool((before[:, 2:6] != after[:, 2:6]).any(-1).all())  # in the window
    assert float((before[:, 8:] - after[:, 8:]).abs().amax(-1).min()) > 1e-9  # through the state
    with torch.no_grad():
        module.to_out.weight[:, 16:] = 0  # ... which nobody reads now
    assert torch.equal(module(x).hidden[:, 6:], module(other).hidden[:, 6:])


def test_vectors_come_to_hold_different_things() -> None:
    """Their embeddings part them, even if all begin alike."""
    module = layer()
    with torch.no_grad():
        module.initial.copy_(module.initial[:1].clone().expand_as(module.initial))
    vectors = feed(module, data(8), Tokens.all_valid(2, 8), [4])[1].vectors
    assert float((vectors[:, 0] - vectors[:, 1]).detach().abs().amax()) > 1e-2
    with torch.no_grad():
        module.identity.zero_()
    vectors = feed(module, data(8), Tokens.all_valid(2, 8), [4])[1].vectors
    close(vectors[:, 0], vectors[:, 1], "without them they stay alike")


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_it_learns_what_a_window_cannot_and_forgets_it_without_its_state(gate: str) -> None:
    """The first of 24 tokens is asked for at the last; W = 4. A window stays at chance, and so it does bereft."""
    assert accuracy("longformer", window=4)[0] < 0.65
    whole, bereft = accuracy("block_recurrent", window=4, states=2, gate=gate)
    assert whole == 1
    assert bereft < 0.65


def accuracy(name: str, **options: Any) -> tuple[float, float]:
    """Of 200 rows after 60 steps, and of the same when nobody reads the second half of what comes out of heads."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> tuple[Tensor, Tensor]:
        bit = torch.randint(2, (count,), generator=generator)
        ids = torch.full((count, 24), 2)
        ids[:, 0] = bit
        return ids, bit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(3, 32), nn.Linear(32, 2)
        attention: Any = zoo.build(name, dim=32, heads=2, **options)

    def said(ids: Tensor) -> Tensor:
        x = embedding(ids)
        logits: Tensor = head((x + attention(x).hidden)[:, -1])
        return logits

    parameters = [*embedding.parameters(), *attention.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(60):
        ids, bit = rows(32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(said(ids), bit).backward()
        optimizer.step()
    ids, bit = rows(200)
    found = []
    with torch.no_grad():
        for _ in range(2):
            found.append(float((said(ids).argmax(-1) == bit).double().mean()))
            attention.to_out.weight[:, 32:] = 0
    return found[0], found[1]


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_closed_gate_keeps_the_initial_state() -> None:
    module = layer()
    with torch.no_grad():
        module.keep.fill_(1000)
    state = feed(module, data(13), Tokens.all_valid(2, 13), [5])[1]
    close(state.vectors, module.initial.expand(2, -1, -1), "kept")


# --- gradients stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [None, 1, 2, 3])
def test_gradients_go_back_through_so_many_blocks(truncate: int | None) -> None:
    """From a token in block 4, W = 4: its window reaches block 3; the state's gradient ends at the last border."""
    module, x = layer(truncate=truncate), data(20, 1).requires_grad_()
    module(x).hidden[:, 16].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum((0, 2)).view(5, 4).sum(1).ne(0).tolist()
    first = {None: 0, 1: 3, 2: 3, 3: 3}[truncate]
    assert reached == [block >= first for block in range(5)]
    grad = module.initial.grad
    assert (grad is not None and bool(grad.ne(0).any())) == (truncate is None)


def test_truncation_counts_blocks_of_the_document_and_not_of_the_call() -> None:
    module, tokens = layer(truncate=2), Tokens.all_valid(2, 23)
    x = data(23).requires_grad_()
    expected = gradients(module, x, module(x).hidden, tokens.valid)
    for name, grad in gradients(module, x, feed(module, x, tokens, [3, 6, 7, 18])[0], tokens.valid).items():
        close(grad, expected[name], f"cut: gradient of {name}", 1e-11)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_an_open_block_waits() -> None:
    """The state changes with a block's last token, whatever the calls; a document begins with the initial one."""
    module, x = layer(), data(14)
    document = torch.tensor([[0] * 9 + [1] * 5] * 2)
    tokens = Tokens.of(torch.ones(2, 14, dtype=torch.bool), document=document)
    state: Any = module.initial_state(2)
    changed = []
    with torch.no_grad():
        for at in range(14):
            before = state.vectors
            state = module(x[:, at : at + 1], piece(tokens, at, at + 1), state=state).state
            changed.append(not torch.equal(before, state.vectors))
            if at in (0, 9):
                assert torch.equal(state.vectors, module.initial.expand(2, -1, -1))
    assert [at for at, yes in enumerate(changed) if yes] == [0, 3, 7, 9, 12]


def test_turns_are_counted_by_document() -> None:
    """Two rows by hand: W = 2; documents of 5 and 3 tokens; a row with padding in front of 4."""
    valid = torch.tensor([[True] * 8, [False] * 4 + [True] * 4])
    document = torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
    layout = Layout.of(Tokens.of(valid, document=document))
    found = turns(layout, layout, Host.plain(2, 0), 2, keeps=False)
    # row 0 has blocks 0 and 1 of its first document, and 0 of its second; row 1 block 0: its last one is not seen
    assert found.counts.tolist() == [3, 1]
    assert found.members.tolist() == [[0, 1], [5, 6], [12, 13], [2, 3]]
    assert found.block.tolist() == [0, 0, 0, 1]
    assert found.start.tolist() == [0, 0, 0]
    # number 1 is left by the first of these, and so on; 0 is there from the start
    assert found.which.tolist() == [[0, 0, 1, 1, 4, 0, 0, 2], [0, 0, 0, 0, 0, 0, 3, 3]]


def test_documents_do_not_wait_for_each_other() -> None:
    """As many turns as the longest document has blocks, in one call and in a later one; holes cost none."""
    document = torch.arange(96).div(12, rounding_mode="floor").expand(2, -1)
    valid = torch.ones(2, 96, dtype=torch.bool)
    for holes, expected in ((1, 2), (3, 1)):
        valid[:, ::3] = holes == 1
        tokens = Tokens.of(valid, document=document)
        layout = Layout.of(tokens)
        assert turns(layout, layout, Host.plain(2, 0), 4, keeps=False).turns == expected
    one = Layout.of(Tokens.of(torch.ones(2, 96, dtype=torch.bool), document=document))
    first, second = one.columns(slice(0, 30)), one.columns(slice(30, 96))
    found = turns(second, one, first.host, 4, keeps=True)
    # a row has documents 2, of which one block is left that somebody sees, 3 to 6 with two, and the last with three
    assert found.counts.tolist() == [12, 10, 2]
    assert sorted(found.start.tolist()) == [0] * 10 + [1, 2]


def test_a_last_block_is_not_gone_through_for_nobody() -> None:
    layout = Layout.plain(1, 12)
    assert turns(layout, layout, Host.plain(1, 0), 4, keeps=False).turns == 2
    assert turns(layout, layout, Host.plain(1, 0), 4, keeps=True).turns == 3
    assert turns(layout, layout, Host.plain(1, 0), 12, keeps=False).turns == 0


# --- the state of decoding -------------------------------------------------------------------------------------------


def test_a_state_holds_a_window_and_the_vectors() -> None:
    module = layer(window=8, states=5, kv_heads=1)
    tokens = Tokens.all_valid(1, 1000)
    with torch.no_grad():
        state: BlockState = feed(module, data(1000, 1), tokens, list(range(100, 1000, 100)))[1]
    assert state.vectors.shape == (1, 5, 16)
    assert state.k.shape == state.v.shape == (1, 5, 1, 8)
    assert state.columns.filled <= 2 * 8 + 32
    assert state_bytes(state) < 20_000


def test_a_state_is_kept_in_float32_at_least() -> None:
    module = layer().to(torch.bfloat16)
    x = data(9).to(torch.bfloat16)
    state = module(x, Tokens.all_valid(2, 9), state=module.initial_state(2)).state
    assert state.vectors.dtype == torch.float32
    assert module.initial_state(1).vectors.dtype == torch.float32


def test_one_layer_of_a_stack() -> None:
    """One recurrent layer among windows, as published: decoding by steps equals the whole."""
    window = {"name": "longformer", "window": 4}
    mixed = [window, {"name": "block_recurrent", "window": 4, "states": 3}, window]
    model = Transformer(attention=mixed, vocab=11, dim=16, heads=2, depth=3).double().eval()
    ids = torch.randint(11, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state: Any = model.initial_state(2)
        found = []
        for column in ids.split(1, 1):
            out = model(column, state=state)
            state = out.state
            found.append(out.logits)
        close(torch.cat(found, 1), model(ids).logits, "steps")


# --- one of many sets of keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("shape", ["blocks", "ragged", "any"])
def test_each_query_sees_its_set(block: int, shape: str) -> None:
    """Against one dense softmax with a mask; outputs and gradients; blocks that are rows, tiles, and mixed tiles."""
    generator = torch.Generator().manual_seed(0)
    L, N, S = 4 * block + 3, 7, 5
    which = torch.arange(L).expand(2, -1) // block + torch.tensor([[0], [2]])
    if shape != "blocks":
        which = torch.randint(N, (2, L), generator=generator) if shape == "any" else (which + (torch.arange(L) > 9)) % N
    q = torch.randn(2, 4, L, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(N, S, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    asked = torch.rand(2, 1, L, 1, generator=generator) < 0.8
    out = attend_to_one_of(q, k, v, which.numpy(), block=block, scale=0.5, asked=asked)
    bias = torch.zeros(2, 1, L, N * S).masked_fill((which[..., None] != torch.arange(N * S) // S)[:, None], -torch.inf)
    keys, values = (x.flatten(0, 1).transpose(0, 1).expand(2, -1, -1, -1) for x in (k, v))
    slow = dense(q, keys, values, bias, scale=0.5).masked_fill(~asked, 0)
    close(out, slow, "output")
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    fast, expected = (torch.autograd.grad((x * weight).sum(), [q, k, v], retain_graph=True) for x in (out, slow))
    for name, a, b in zip("qkv", fast, expected):
        close(a, b, f"gradient of {name}")


@pytest.mark.parametrize(
    ("option", "value"), [("window", 0), ("states", 0), ("gate", "gru"), ("truncate", 0), ("truncate", 1.5)]
)
def test_wrong_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        layer(**{option: value})


def test_projections_of_the_state_are_counted() -> None:
    """Of tokens four, and out of heads; of states those that are used: of the last the keys alone."""
    module, x = layer().float(), torch.randn(1, 12, 16)
    with torch.no_grad(), LinearFlops(module) as linear:
        module(x)
    tokens, states, turns = 12, 3, 2
    queries = out = 2 * states * 16 * 32
    keys = 2 * states * 16 * 32
    assert linear.flops == 2 * tokens * 16 * (4 * 16 + 32) + turns * (queries + out) + (turns + 1) * keys


def test_a_token_more_holds_what_is_kept_of_it_and_no_more() -> None:
    """Gradients of what states were projected to, 4 times their width and more, are held of a few states at once.

    A block's states hold vectors, keys, values and what was found, and gradients of keys and values: 8 times the width.
    """
    module = zoo.build("block_recurrent", dim=64, heads=1, window=64, states=64)
    window = zoo.build("longformer", dim=64, heads=1, window=64, global_projections="shared")

    def held(layer: nn.Module, length: int) -> int:
        x = torch.randn(1, length, 64, requires_grad=True)
        layer(x).hidden.sum().backward()
        return peak_memory(lambda: layer(x).hidden.sum().backward()).peak_bytes

    grown = [held(each, 4096) - held(each, 2048) for each in (module, window)]
    assert grown[0] - grown[1] <= 9 * 2048 * 64 * 4


@pytest.mark.slow
@pytest.mark.long
def test_time_is_that_of_the_window_and_of_what_the_state_adds() -> None:
    """At 16,384 tokens, 8 heads x 64, forward and backward: within 1.25 times what the same window takes by itself,
    raised by as many FLOPs as the state adds.
    """
    layer = zoo.build("block_recurrent", dim=512, heads=8).train()
    window = zoo.build("longformer", dim=512, heads=8, window=layer.window, global_projections="shared").train()
    x = torch.randn(1, 16384, 512).requires_grad_()
    with torch.no_grad():
        added = flops_of(layer, x) / flops_of(window, x)
    assert 1.5 < added < 4

    def ours() -> None:
        layer(x).hidden.sum().backward()

    def alone() -> None:
        window(x).hidden.sum().backward()

    assert_within(1.25 * added, ours, alone)
