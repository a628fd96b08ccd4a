"""Prefill and steps of the recorded mechanisms: caches that grow in place, and cost the same at any length.

What every state must do, the contract suite asks (attention_zoo/testing/states.py and decoding.py).
"""

from __future__ import annotations

import pytest
import torch
from recorded import NEWER, RECORDED
from torch.utils._python_dispatch import TorchDispatchMode

from attention_zoo import Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon, none
from attention_zoo.model.state import reserve, state_bytes
from attention_zoo.testing.case import Case, close, piece, ragged, run
from attention_zoo.testing.decoding import Touched, context, cost_of_steps, last_rows, steps

CONSTANT = [name for name in RECORDED if Case.of(name).can.state == "constant"]


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


@pytest.mark.parametrize("name", [*RECORDED, *NEWER])
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


@pytest.fixture
def unwritten_is_nan():
    """Memory that nobody has written to."""
    filled, exact = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(exact)


ONCE = ("reformer", {"correct_duplicates": True})


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in [*RECORDED, *NEWER]), ONCE], ids=str)
def test_the_room_behind_what_is_held_is_never_read(name, options):
    case = Case.of(name)
    layer, x, tokens = case.build(causal=True, **options), case.data(2, 40), Tokens.all_valid(2, 40)
    expected, state = last_rows(layer, x, tokens, 0), layer.initial_state(2)
    with torch.no_grad():
        for start, stop in [(0, 8), *((at, at + 1) for at in range(8, 40))]:
            out = layer(x[:, start:stop], piece(tokens, start, stop), state=state)
            state = out.state
            close(out.hidden, expected[:, start:stop], f"{name}, {start} to {stop}")


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
    ("h_transformer_1d", {"block": 6, "kv_heads": 1}),
    ("memory_compressed", {"compression": 4, "kv_heads": 1}),
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
    if name == "h_transformer_1d":
        assert len(state.buffers) == 3, "steps keep the groups beside the tokens"
    if name == "bigbird":
        assert state.ledger.steady
        assert "_listed" in vars(state.ledger.fields), "steps read the listed global tokens alone"


def test_steps_behind_a_padded_piece_close_its_holes():
    """The last piece of right-padded prompts leaves some: the second step is one of consecutive columns again."""
    layer = Case.of("bigbird").build(causal=True)
    x, valid = Case.of("bigbird").data(2, 220), torch.ones(2, 220, dtype=torch.bool)
    valid[1, 205:210] = False
    tokens = Tokens.of(valid)
    state = run(layer, x[:, :200], piece(tokens, 0, 200), state=reserve(layer.initial_state(2), 400)).state
    state = run(layer, x[:, 200:210], piece(tokens, 200, 210), state=state).state
    assert not state.ledger.steady
    found, state = steps(layer, x, tokens, state, 210, 212)
    assert state.ledger.steady
    found, state = steps(layer, x, tokens, state, 212, 220)
    close(found[:, -1], run(layer, x, tokens).hidden[:, -1], "behind the holes")


# --- what a step costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_a_step_costs_the_same_at_any_length(name):
    """Counted, not timed. Full attention reads its cache, and Reformer counts its tokens; neither moves them.

    Of any mechanism with a constant state the contract suite asks the same.
    """
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
    horizon = Horizon(most, most=most)
    columns, one, width = Columns.of(none(1, "cpu"), torch.zeros(1, 0, 5)), torch.ones(1, 1, dtype=torch.bool), 5
    length = 1500
    with torch.no_grad(), Touched() as touched:
        for at in range(length):
            new = torch.full((1, 1, width), float(at))
            layout = Layout.of(Tokens.of(one, start=at))
            columns, _ = columns.append(layout, new, horizon=horizon).settle(layout, horizon=horizon)
    assert columns.held[0][0, -100:, 0].tolist() == list(range(length - 100, length))
    assert columns.ledger.room <= 1.3 * (length if most is None else most) + 64
    assert touched.moved <= 10 * length * (width + 5)


def test_a_reserved_cache_never_moves():
    layer = Case.of("full").build(causal=True, dtype=torch.float32)
    state = context(layer, 100, room=500)
    buffers = state.buffers
    x, one = torch.randn(1, 1, layer.dim), torch.ones(1, 1, dtype=torch.bool)
    for at in range(100, 500):
        state = run(layer, x, Tokens.of(one, start=at), state=state).state
        assert all(mine is first for mine, first in zip(state.buffers, buffers))
    assert state.ledger.room == 500


class Gathered(TorchDispatchMode):
    """Counts operators, and the rows that are picked out of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.picked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        found = function(*args, **(kwargs or {}))
        if "index_select" in str(function):
            self.picked += len(found)
        return found


def counted_step(layer, length: int) -> Gathered:
    state = context(layer, length, room=length + 50)
    x, one = torch.randn(1, 1, layer.dim), torch.ones(1, 1, dtype=torch.bool)
    for at in range(length, length + 3):
        state = run(layer, x, Tokens.of(one, start=at), state=state).state
    with Gathered() as seen:
        run(layer, x, Tokens.of(one, start=length + 3), state=state)
    return seen


@pytest.mark.parametrize(
    "name",
    ["full", "longformer", "bigbird", "transformer_xl", "adaptive_span", "compressive", "h_transformer_1d", "reformer"],
)
def test_a_step_takes_as_many_operators_behind_any_context(name):
    layer = Case.of(name).build(causal=True, dtype=torch.float32)
    assert counted_step(layer, 1024).operators == counted_step(layer, 8192).operators


def test_a_step_of_a_hierarchy_reads_a_block_a_level():
    """Near tokens in two blocks, and at most a block of groups at each level; one group is made."""
    layer = Case.of("h_transformer_1d").build(causal=True, dtype=torch.float32, block=16)
    assert counted_step(layer, 12).picked == 2 * layer.kv_heads * 16  # keys and values of 16 tokens that there are
    for length, levels in ((1024, 6), (8192, 9)):
        assert 0 < counted_step(layer, length).picked <= layer.kv_heads * 16 * (2 * 2 + levels)


def test_bigbird_picks_no_key_where_all_are_seen():
    """And never more than each head is linked to."""
    layer = Case.of("bigbird").build(causal=True, dtype=torch.float32, block=16, random=2)
    assert counted_step(layer, 8).picked == 0
    assert counted_step(layer, 40).picked == 0
    assert 0 < counted_step(layer, 1024).picked <= 2 * layer.heads * 16 * (1 + 2 + 2)


@pytest.mark.parametrize("length", [20, 40, 100])
def test_bigbird_lists_no_more_blocks_than_there_are(length):
    """However many random ones are asked for, where rows differ and so pick: the host looks at each listed key."""
    layer = Case.of("bigbird").build(causal=True, dtype=torch.float32, block=16, random=64)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, -1] = False
    tokens, one = Tokens.of(valid), torch.ones(2, 1, dtype=torch.bool)
    state = run(layer, torch.randn(2, length, layer.dim), tokens, state=layer.initial_state(2)).state
    run(layer, torch.randn(2, 1, layer.dim), Tokens.of(one, start=tokens.next_position), state=state)
    assert layer.reach.kept("row", dict)["last"][1].shape[-1] <= length // 16 + 1


@pytest.mark.parametrize("options", [{}, {"positions": "alibi"}], ids=str)
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_a_step_may_begin_a_document_at_a_later_position(name, options):
    """Of a document whose first tokens nobody holds: what is read is what the definition reads."""
    case, found = Case.of(name), []
    x, tokens = case.data(2, 11), Tokens.all_valid(2, 10)
    one = torch.ones(2, 1, dtype=torch.bool)
    for kernel in ("auto", "dense"):
        layer = case.build(causal=True, kernel=kernel, **options)
        state = run(layer, x[:, :10], tokens, state=layer.initial_state(2)).state
        for at in range(10, 14):
            step = Tokens.of(one, document=one.long(), start=torch.full((2,), at))
            out = run(layer, x[:, 10:], step, state=state)
            state = out.state
            found.append(out.hidden)
    for step, (ours, defined) in enumerate(zip(found[:4], found[4:])):
        close(ours, defined, f"{name}, step {step}")
