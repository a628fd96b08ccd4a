"""Decoding: states that are used again, copied and kept, and what one more token costs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo.contract import Attention, Tokens
from attention_zoo.model.state import detach, reorder, reserve
from attention_zoo.testing.case import Case, close, piece, ragged, run
from attention_zoo.testing.check import check

PIECE = 8192
"""Tokens by which a long context is built."""


def decodes(case: Case) -> bool:
    return case.can.carry == "prefix"


def steps(layer: Attention, x: Tensor, tokens: Tokens, state: Any, start: int, stop: int) -> tuple[Tensor, Any]:
    """One token at a time: hidden states and the last state."""
    found = []
    for at in range(start, stop):
        out = run(layer, x[:, at : at + 1], piece(tokens, at, at + 1), state=state)
        state = out.state
        found.append(out.hidden)
    return torch.cat(found, 1), state


def last_rows(layer: Attention, x: Tensor, tokens: Tokens, start: int) -> Tensor:
    """Each row of the output as the last of its own prefix: what a step must give, also where later tokens matter."""
    return torch.cat(
        [run(layer, x[:, :n], piece(tokens, 0, n)).hidden[:, -1:] for n in range(start + 1, x.shape[1] + 1)], 1
    )


@check(decodes)
def an_older_state_is_still_right(case: Case) -> None:
    """Two continuations of one state, step by step in turn: nobody writes into what another sees."""
    layer, length, at = case.build(causal=True), 40, 20
    x, other, tokens = case.data(2, length), case.data(2, length, seed=5), Tokens.all_valid(2, length)
    other[:, :at] = x[:, :at]
    state = run(layer, x[:, :at], piece(tokens, 0, at), state=layer.initial_state(2)).state
    mine, theirs = state, state
    expected = [last_rows(layer, row, tokens, at) for row in (x, other)]
    for step in range(at, length):
        ours, others = (
            run(layer, row[:, step : step + 1], piece(tokens, step, step + 1), state=one)
            for row, one in ((x, mine), (other, theirs))
        )
        close(ours.hidden, expected[0][:, step - at : step - at + 1], f"{case.name}, step {step}")
        close(others.hidden, expected[1][:, step - at : step - at + 1], f"{case.name}, step {step} of the other")
        mine, theirs = ours.state, others.state
    # and the very first state once more
    close(steps(layer, other, tokens, state, at, at + 3)[0], expected[1][:, :3], f"{case.name}: the first state")


@check(decodes)
def copies_of_a_state_go_their_own_way(case: Case) -> None:
    """deepcopy, detach and pickle: each goes on with tokens of its own."""
    copies: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy, "detach": detach, "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    }  # fmt: skip
    layer, x, other = case.build(causal=True), case.data(2, 30), case.data(2, 30, seed=5)
    tokens = Tokens.all_valid(2, 30)
    other[:, :9] = x[:, :9]
    mine, theirs = last_rows(layer, x, tokens, 9), last_rows(layer, other, tokens, 9)
    for name, copied in copies.items():
        state = run(layer, x[:, :8], piece(tokens, 0, 8), state=layer.initial_state(2)).state
        state = run(layer, x[:, 8:9], piece(tokens, 8, 9), state=state).state  # in a buffer with room
        twin = copied(state)
        first, second = (steps(layer, row, tokens, one, 9, 30)[0] for row, one in ((x, state), (other, twin)))
        close(first, mine, f"{case.name}: a state that was copied by {name}")
        close(second, theirs, f"{case.name}: the copy by {name}")


@check(decodes)
def beams_are_reordered_at_every_step(case: Case) -> None:
    """Rows are picked, repeated and dropped before each token."""
    layer, x, tokens = case.build(causal=True), case.data(3, 24), Tokens.all_valid(3, 24)
    generator = torch.Generator().manual_seed(0)
    state = run(layer, x[:, :5], piece(tokens, 0, 5), state=layer.initial_state(3)).state
    history = x[:, :5]
    for at in range(5, 24):
        order = torch.randint(3, (3,), generator=generator)
        state, history = reorder(state, order), torch.cat([history[order], x[:, at : at + 1]], 1)
        out = run(layer, x[:, at : at + 1], piece(tokens, at, at + 1), state=state)
        state = out.state
        expected = run(layer, history, piece(tokens, 0, at + 1)).hidden[:, -1:]
        close(out.hidden, expected, f"{case.name}: beams reordered before each token, step {at}")


@check(decodes)
def what_is_remembered_is_what_a_call_leaves(case: Case) -> None:
    """`remember`, which may spare the output, against calls."""
    layer, x, tokens = case.build(causal=True), case.data(3, 40), Tokens.of(ragged(40, [40, 21, 9], "left"))
    state = layer.initial_state(3)
    for start, stop in ((0, 13), (13, 30)):
        with torch.no_grad():
            state = layer.remember(x[:, start:stop], piece(tokens, start, stop), state=state)
    found = run(layer, x[:, 30:], piece(tokens, 30, 40), state=state).hidden
    close(found, run(layer, x, tokens).hidden[:, 30:], f"{case.name}: behind what `remember` left")


@check(decodes)
def steps_that_do_not_simply_go_on(case: Case) -> None:
    """Rows that skip a step, documents that end, global tokens where they may come."""
    layer, length = case.build(causal=True), 90
    valid = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.8
    valid[0] = True
    document = torch.arange(length)[None] // torch.tensor([[1000], [37], [20]])
    is_global = None
    if case.can.global_tokens == "any":
        is_global = torch.zeros_like(valid)
        is_global[:, [3, 30, 60]] = True
    x, tokens = case.data(3, length), Tokens.of(valid, is_global, document)
    found, _ = steps(layer, x, tokens, layer.initial_state(3), 0, length)
    for end in (1, 2, 33, 38, 61, 75, length):
        expected = run(layer, x[:, :end], piece(tokens, 0, end)).hidden[:, -1]
        here = valid[:, end - 1]
        close(found[here, end - 1], expected[here], f"{case.name}: steps with padding and documents, token {end}")


# --- what a step costs ------------------------------------------------------------------------------------------------


class Touched(TorchDispatchMode):
    """Elements that operators read or write: views are free, gathers read what they yield, new memory nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.is_view:
            return found
        results = found if isinstance(found, tuple | list) else [found]
        outputs = [each for each in results if isinstance(each, Tensor)]
        picks = any(word in str(function) for word in ("gather", "index", "embedding", "new_"))
        inputs = [] if picks else [each for each in args if isinstance(each, Tensor)]
        self.elements += sum(each.numel() for each in (*outputs, *inputs))
        if "copy_" in str(function) or "cat" in str(function):
            self.moved += sum(each.numel() for each in outputs)
        return found


def context(layer: Attention, length: int, room: int = 0) -> Any:
    """The state of one row of `length` tokens, with room for so many columns."""
    state = reserve(layer.initial_state(1), room)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, length, PIECE):
        stop = min(start + PIECE, length)
        x = torch.randn(1, stop - start, layer.dim, generator=generator)
        with torch.no_grad():
            valid = torch.ones(1, stop - start, dtype=torch.bool)
            state = layer.remember(x, Tokens.of(valid, start=start), state=state)
    return state


def cost_of_steps(layer: Attention, length: int) -> tuple[float, float]:
    """Elements touched and moved by a step behind `length` tokens, the mean of some."""
    state, count = context(layer, length, room=length + 50), 8
    x = torch.randn(1, 1, layer.dim, generator=torch.Generator().manual_seed(1))
    one = torch.ones(1, 1, dtype=torch.bool)
    for at in range(length, length + 4):  # the first may have to hash and sort
        state = run(layer, x, Tokens.of(one, start=at), state=state).state
    with Touched() as touched:
        for at in range(length + 4, length + 4 + count):
            state = run(layer, x, Tokens.of(one, start=at), state=state).state
    return touched.elements / count, touched.moved / count


@check(lambda case: decodes(case) and case.can.state == "constant")
def a_step_costs_the_same_at_any_length(case: Case) -> None:
    """Elements touched by a step behind 512 and behind 4,096 tokens: counted, not timed."""
    layer = case.build(causal=True, dtype=torch.float32)
    short, long = (cost_of_steps(layer, length)[0] for length in (512, 4096))
    assert long <= 1.05 * short, (
        f"{case.name}: a step touches {short:,.0f} elements behind 512 tokens and {long:,.0f} behind 4,096; the state "
        f"is declared constant, so what it holds must be all that a step reads: forget what no later token sees, or "
        f"declare state='linear'"
    )
