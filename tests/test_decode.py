"""Prefill and steps: caches that grow in place, are never wrong, and cost the same at any length of the context."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.model.state import detach, reorder
from attention_zoo.testing.case import Case, close, piece, ragged, run

CARRYING = [name for name in zoo.available() if Case.of(name).can.carry == "prefix"]
CONSTANT = [name for name in CARRYING if Case.of(name).can.state == "constant"]


def steps(layer, x: Tensor, tokens: Tokens, state, start: int, stop: int) -> tuple[Tensor, object]:
    """One token at a time."""
    found = []
    for at in range(start, stop):
        out = run(layer, x[:, at : at + 1], piece(tokens, at, at + 1), state=state)
        state = out.state
        found.append(out.hidden)
    return torch.cat(found, 1), state


def last_rows(layer, x: Tensor, tokens: Tokens, start: int) -> Tensor:
    """Each row of the output as the last of its own prefix: what a step must give, also where later tokens matter."""
    return torch.cat(
        [run(layer, x[:, :n], piece(tokens, 0, n)).hidden[:, -1:] for n in range(start + 1, x.shape[1] + 1)], 1
    )


# --- older states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRYING)
def test_a_state_that_was_used_before_is_still_right(name):
    """Two continuations of one state, step by step in turn: nobody writes into what another sees."""
    case = Case.of(name)
    layer, length, at = case.build(causal=True), 50, 20
    x, other, tokens = case.data(2, length), case.data(2, length, seed=5), Tokens.all_valid(2, length)
    other[:, :at] = x[:, :at]
    state = run(layer, x[:, :at], piece(tokens, 0, at), state=layer.initial_state(2)).state
    mine, theirs = state, state
    expected = [last_rows(layer, row, tokens, at) for row in (x, other)]
    for step in range(at, length):
        mine, theirs = (
            run(layer, row[:, step : step + 1], piece(tokens, step, step + 1), state=one)
            for row, one in ((x, mine), (other, theirs))
        )
        close(mine.hidden, expected[0][:, step - at : step - at + 1], f"{name}, step {step}")
        close(theirs.hidden, expected[1][:, step - at : step - at + 1], f"{name}, step {step} of the other")
        mine, theirs = mine.state, theirs.state
    # and the very first state once more
    close(steps(layer, other, tokens, state, at, at + 3)[0], expected[1][:, :3], f"{name}: the first state")


@pytest.mark.parametrize("copied", [copy.deepcopy, detach, lambda s: pickle.loads(pickle.dumps(s))], ids=range(3))
@pytest.mark.parametrize("name", CARRYING)
def test_copies_of_a_state_go_their_own_way(name, copied):
    case = Case.of(name)
    layer, x, other = case.build(causal=True), case.data(2, 40), case.data(2, 40, seed=5)
    tokens = Tokens.all_valid(2, 40)
    other[:, :9] = x[:, :9]
    state = run(layer, x[:, :8], piece(tokens, 0, 8), state=layer.initial_state(2)).state
    state = run(layer, x[:, 8:9], piece(tokens, 8, 9), state=state).state  # in a buffer with room
    twin = copied(state)
    first, second = (steps(layer, row, tokens, one, 9, 40)[0] for row, one in ((x, state), (other, twin)))
    close(first, last_rows(layer, x, tokens, 9), name)
    close(second, last_rows(layer, other, tokens, 9), f"{name}: the copy")


@pytest.mark.parametrize("name", CARRYING)
def test_beams_are_reordered_at_every_step(name):
    case = Case.of(name)
    layer, x, tokens = case.build(causal=True), case.data(3, 30), Tokens.all_valid(3, 30)
    generator = torch.Generator().manual_seed(0)
    state = run(layer, x[:, :5], piece(tokens, 0, 5), state=layer.initial_state(3)).state
    history = x[:, :5]
    for at in range(5, 30):
        order = torch.randint(3, (3,), generator=generator)
        state, history = reorder(state, order), torch.cat([history[order], x[:, at : at + 1]], 1)
        out = run(layer, x[:, at : at + 1], piece(tokens, at, at + 1), state=state)
        state = out.state
        expected = run(layer, history, piece(tokens, 0, at + 1)).hidden[:, -1:]
        close(out.hidden, expected, f"{name}, step {at}")


@pytest.mark.parametrize("name", CARRYING)
def test_inference_mode_and_gradients_take_turns(name):
    """States made in one mode go on in another; only what is written in place differs."""
    case = Case.of(name)
    layer, x, tokens = case.build(causal=True), case.data(2, 32), Tokens.all_valid(2, 32)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad]
    state, expected = layer.initial_state(2), last_rows(layer, x, tokens, 0)
    for at in range(32):
        with modes[at // 3 % len(modes)]():
            out = layer(x[:, at : at + 1], piece(tokens, at, at + 1), state=state)
        state = out.state
        close(out.hidden, expected[:, at : at + 1], f"{name}, step {at}")


def test_nothing_that_a_graph_needs_is_overwritten():
    """Gradients through a state whose room a later call without gradients wrote into."""
    case = Case.of("full")
    layer, tokens = case.build(causal=True), Tokens.all_valid(1, 12)
    x = case.data(1, 12).requires_grad_()
    state = run(layer, x.detach()[:, :4], piece(tokens, 0, 4), state=layer.initial_state(1)).state
    out = layer(x[:, 4:8], piece(tokens, 4, 8), state=state)
    run(layer, x.detach()[:, 4:5], piece(tokens, 4, 5), state=state)
    run(layer, x.detach()[:, 8:9], piece(tokens, 8, 9), state=out.state)
    out.hidden.square().sum().backward()
    assert x.grad is not None
    assert x.grad[:, 4:8].abs().sum() > 0


@pytest.mark.parametrize("name", CARRYING)
def test_what_is_remembered_is_what_a_call_leaves(name):
    case = Case.of(name)
    layer, x, tokens = case.build(causal=True), case.data(3, 40), Tokens.of(ragged(40, [40, 21, 9], "left"))
    state = layer.initial_state(3)
    for start, stop in ((0, 13), (13, 30)):
        with torch.no_grad():
            state = layer.remember(x[:, start:stop], piece(tokens, start, stop), state=state)
    found = run(layer, x[:, 30:], piece(tokens, 30, 40), state=state).hidden
    close(found, run(layer, x, tokens).hidden[:, 30:], name)
