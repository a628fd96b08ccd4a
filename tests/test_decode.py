"""Prefill and steps: caches that grow in place, are never wrong, and cost the same at any length of the context."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.layout.ledger import Columns
from attention_zoo.model.state import detach, reorder, reserve, state_bytes
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


# --- any option, any layout -------------------------------------------------------------------------------------------

OPTIONS = [
    ("reformer", {"attend_across_buckets": False}),
    ("reformer", {"correct_duplicates": True, "look_back": 2}),
    ("reformer", {"buckets": [4, 2], "look_back": 0, "key_norm_epsilon": 1e-3}),
    ("reformer", {"rounds": 1, "chunk": 16, "head_width": 6}),
    ("bigbird", {"positions": "alibi", "kv_heads": 1}),
    ("bigbird", {"positions": "rotary", "window_blocks": 5, "random": 3}),
    ("bigbird", {"extra_global_tokens": 2, "block": 3}),
    ("bigbird", {"random": 0, "block": 7}),
    ("longformer", {"positions": "alibi", "kv_heads": 1, "dilation": [1, 2]}),
    ("longformer", {"global_projections": "shared", "window": 9}),
    ("full", {"positions": "rotary", "kv_heads": 1}),
    ("transformer_xl", {"segment_length": 7, "memory_length": 9, "same_length": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_steps_equal_the_whole_prefix(name, options):
    """Rows of different lengths, far enough for caches to be full, moved and sorted again."""
    layer = Case.of(name).build(causal=True, **options)
    length, at = 150, 20
    x, tokens = Case.of(name).data(3, length), Tokens.of(ragged(length, [length, length - 7, length - 19], "left"))
    state = run(layer, x[:, :at], piece(tokens, 0, at), state=layer.initial_state(3)).state
    found, state = steps(layer, x, tokens, state, at, length)
    for end in (at + 1, at + 2, 90, 97, length - 1, length):
        expected = run(layer, x[:, :end], piece(tokens, 0, end)).hidden[:, -1]
        close(found[:, end - at - 1], expected, f"{name} {options}, token {end}")
    if name == "reformer":
        assert state.sorted is not None
    if name == "bigbird":
        assert state.columns.steady
        assert state.globals is not None


@pytest.mark.parametrize("name", CARRYING)
def test_steps_with_padding_documents_and_late_globals(name):
    """Steps that do not simply go on: rows that skip a step, documents that end, global tokens where they may come."""
    case = Case.of(name)
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
        close(found[here, end - 1], expected[here], f"{name}, token {end}")


# --- what a step costs ------------------------------------------------------------------------------------------------


class Touched(TorchDispatchMode):
    """Counts elements that operators read or write; views are free, and gathers read what they yield."""

    def __init__(self):
        super().__init__()
        self.elements = self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.is_view:
            return found
        results = found if isinstance(found, tuple | list) else [found]
        outputs = [each for each in results if isinstance(each, Tensor)]
        picks = any(word in str(function) for word in ("gather", "index", "embedding"))
        inputs = [] if picks else [each for each in args if isinstance(each, Tensor)]
        self.elements += sum(each.numel() for each in (*outputs, *inputs))
        if "copy_" in str(function) or "cat" in str(function):
            self.moved += sum(each.numel() for each in outputs)
        return found


def context(layer, length: int, room: int = 0):
    """The state of one row of `length` tokens."""
    state = reserve(layer.initial_state(1), room)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, length, 8192):
        stop = min(start + 8192, length)
        x = torch.randn(1, stop - start, layer.dim, generator=generator)
        with torch.no_grad():
            valid = torch.ones(1, stop - start, dtype=torch.bool)
            state = layer.remember(x, Tokens.of(valid, start=start), state=state)
    return state


def cost_of_steps(layer, length: int) -> tuple[float, float]:
    """Elements touched and moved by a step behind `length` tokens, the mean of some."""
    state, count = context(layer, length, room=length + 50), 8
    x, one = torch.randn(1, 1, layer.dim), torch.ones(1, 1, dtype=torch.bool)
    for at in range(length, length + 4):  # the first may have to hash and sort
        state = run(layer, x, Tokens.of(one, start=at), state=state).state
    with Touched() as touched:
        for at in range(length + 4, length + 4 + count):
            state = run(layer, x, Tokens.of(one, start=at), state=state).state
    return touched.elements / count, touched.moved / count


@pytest.mark.parametrize("name", CARRYING)
def test_a_step_costs_the_same_at_any_length(name):
    """Counted, not timed. Full attention reads its cache, and Reformer counts its tokens; neither moves them."""
    layer = Case.of(name).build(causal=True, dtype=torch.float32)
    (short, moved), (long, moved_later) = (cost_of_steps(layer, length) for length in (2048, 16384))
    assert moved_later <= 1.05 * moved
    assert moved <= 40 * layer.dim
    more = (long - short) / (16384 - 2048)  # elements per token of the context
    if name == "full":
        assert 2 * layer.dim <= more <= 2 * layer.dim + 64
    elif name == "reformer":
        assert more <= 4
    else:
        assert long <= 1.05 * short


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_states_are_constant(name):
    layer = Case.of(name).build(causal=True, dtype=torch.float32)
    short, long = context(layer, 1024), context(layer, 131072)
    assert state_bytes(short) == state_bytes(long)
    one = torch.ones(1, 1, dtype=torch.bool)
    for at in range(200):
        long = run(layer, torch.randn(1, 1, layer.dim), Tokens.of(one, start=131072 + at), state=long).state
        assert state_bytes(long) == state_bytes(short)


@pytest.mark.parametrize("most", [None, 300])
def test_columns_are_moved_a_few_times_each(most):
    """Growing by single columns copies each a bounded number of times, whether all are kept or a window."""

    def live(tokens):
        return tokens.valid if most is None else tokens.valid & (tokens.position > tokens.position[:, -1:] - most)

    columns, one, width = Columns.of(Tokens.none(1), torch.zeros(1, 0, 5)), torch.ones(1, 1, dtype=torch.bool), 5
    with torch.no_grad(), Touched() as touched:
        for at in range(3000):
            new = torch.full((1, 1, width), float(at))
            columns = columns.append(Tokens.of(one, start=at), new, live=live, most=most)
            columns = columns.settle(1, live=live, most=most)
    assert columns.held[0][0, -100:, 0].tolist() == list(range(2900, 3000))
    assert columns.room <= 1.3 * (3000 if most is None else most) + 64
    assert touched.moved <= 10 * 3000 * (width + 5)


def test_a_reserved_cache_never_moves():
    layer = Case.of("full").build(causal=True, dtype=torch.float32)
    state = context(layer, 100, room=500)
    buffers = state.columns.buffers
    x, one = torch.randn(1, 1, layer.dim), torch.ones(1, 1, dtype=torch.bool)
    for at in range(100, 500):
        state = run(layer, x, Tokens.of(one, start=at), state=state).state
        assert all(mine is first for mine, first in zip(state.columns.buffers, buffers))
    assert state.columns.room == 500
