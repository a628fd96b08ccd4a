"""What is particular to compressive memory: what is evicted, what is stored, what learns from what."""

from __future__ import annotations

import pytest
import torch
from references.compressive import document, documents, reconstruction, reference

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.attention import compressive, compressive_plans
from attention_zoo.measure.core import Shape, core_of
from attention_zoo.ops.relative import segment_tiles
from attention_zoo.testing.case import Case, close, feed, gradients, piece, run

FUNCTIONS = ("mean", "max", "conv", "dilated", "most_used")
SIZES = (
    {"ratio": 2, "segment_length": 4, "memory_length": 3, "compressed_length": 3},
    {"ratio": 3, "segment_length": 5, "memory_length": 4, "compressed_length": 2},
    {"ratio": 1, "segment_length": 3, "memory_length": 2, "compressed_length": 4},
    {"ratio": 4, "segment_length": 4, "memory_length": 8, "compressed_length": 1},
    {"ratio": 2, "segment_length": 6, "memory_length": 0, "compressed_length": 5},
)
PLAIN = Tokens.all_valid(3, 29)


def case(**options) -> Case:
    return Case.of("compressive", reference=reference, **options)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_the_loop_over_segments_at_any_cut(function, sizes):
    here = case(compression=function, **sizes)
    layer, x = here.build(), here.data(3, 29)
    for name, tokens in here.telling(29):
        with torch.no_grad():
            expected = reference(layer, x, tokens)
            whole, state = feed(layer, x, tokens, [])
            steps, after = feed(layer, x, tokens, list(range(1, 29)))
        for found in (run(layer, x, tokens).hidden, whole, steps):
            close(found[tokens.valid], expected[tokens.valid], f"{function} {sizes} {name}")
        for held in (state, after):
            check_slots(layer, x, tokens, held, f"{function} {sizes} {name}")


@pytest.mark.parametrize("few", [0, 1 << 22])
@pytest.mark.parametrize("scores", [1, 1 << 26])
def test_pieces_of_any_size_together_are_the_same(few, scores, monkeypatch):
    """As on a GPU: filled up, all at once or by sizes; outputs and gradients, at any cut."""
    monkeypatch.setattr(compressive, "triton_reason", lambda _: None)
    monkeypatch.setattr(compressive_plans, "FEW_SCORES", few)
    monkeypatch.setattr(segment_tiles, "TILE", {"cuda": scores, "cpu": 1})
    agrees_with_the_reference(case(kernel="segments"))


@pytest.mark.parametrize(("alone", "rows", "scores"), [(1, 2, 1), (1 << 16, 2, 15), (1 << 16, 128, 15)])
def test_pieces_in_parts_are_the_same(alone, rows, scores, monkeypatch):
    """As long ones on a CPU: head by head or some heads at once, and some rows after others."""
    monkeypatch.setattr(segment_tiles, "ALONE", alone)
    monkeypatch.setattr(segment_tiles, "ROWS", rows)
    monkeypatch.setattr(segment_tiles, "TILE", {"cuda": 1, "cpu": scores})
    agrees_with_the_reference(case(kernel="segments", segment_length=5, heads=4))


def agrees_with_the_reference(here):
    layer = here.build()
    for name, tokens in here.layouts(29):
        x = here.data(3, 29).requires_grad_()
        fast, slow = layer(x, tokens).hidden, reference(layer, x, tokens)
        cut = feed(layer, x, tokens, [3, 11, 12])[0]
        for found in (fast, cut):
            close(found[tokens.valid], slow[tokens.valid], name)
        expected = gradients(layer, x, slow, tokens.valid)
        for of, grad in gradients(layer, x, fast, tokens.valid).items():
            close(grad, expected[of], f"{name}: gradient of {of}", 1e-11)


def check_slots(layer, x, tokens, state, where):
    """The compressed memory is that of the loop, in number, place and value, and detached."""
    (states,), fields = state.slots.held, state.slots.tokens
    assert states.shape[1] <= layer.compressed_length
    for row in range(len(x)):
        number, columns = documents(tokens, row)[-1]
        positions = [int(tokens.position[row, column]) for column in columns]
        _, expected, _ = document(layer, [x[row, column] for column in columns], positions)
        valid = fields.valid[row]
        assert fields.position[row, valid].tolist() == [group for group, _ in expected], where
        assert set(fields.document[row, valid].tolist()) <= {number}
        if expected:
            close(states[row, valid], torch.stack([z for _, z in expected]), where)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("function", ["conv", "dilated"])
def test_the_loss_is_of_what_is_evicted_alone(function, sizes):
    """Value and gradients, against the loop over queries; padding and documents included."""
    here = case(compression=function, reconstruction=0.5, **sizes)
    layer, x = here.build(), here.data(3, 29)
    for name, tokens in here.layouts(29):
        if name in ("holes", "padded left", "documents"):
            evictions = []
            for row in range(3):
                for _, columns in documents(tokens, row):
                    positions = [int(tokens.position[row, column]) for column in columns]
                    evictions += document(layer, [x[row, column] for column in columns], positions)[2]
            expected = 0.5 * reconstruction(layer, evictions, int(tokens.valid.sum()))
            found = layer(x, tokens).losses["reconstruction"]
            close(found, expected, name)
            mine, theirs = (torch.autograd.grad(loss, list(layer.compress.parameters())) for loss in (found, expected))
            for ours, wanted in zip(mine, theirs):
                close(ours, wanted, name)


def test_the_loss_teaches_the_compression_alone_and_outputs_do_not():
    layer, x = case().build(), case().data(2, 29).requires_grad_()
    out = layer(x)
    out.losses["reconstruction"].backward(retain_graph=True)
    taught = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert taught == {"compress.conv.weight", "compress.conv.bias"}
    assert x.grad is None
    layer.zero_grad()
    out.hidden.square().sum().backward()
    assert all(parameter.grad is None for parameter in layer.compress.parameters())


def test_weights_learn_after_the_first_overflow():
    """In call after call, with a state: the public port freezes its keys and values for ever."""
    layer, x = case().build().train(), case().data(2, 40)
    optimizer, state = torch.optim.SGD(layer.parameters(), lr=1e-3), layer.initial_state(2)
    tokens = Tokens.all_valid(2, 40)
    for start in range(0, 40, 8):
        before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        out = layer(x[:, start : start + 8], piece(tokens, start, start + 8), state=state)
        state = out.state
        assert not any(buffer.requires_grad for part in state for buffer in part.buffers)
        optimizer.zero_grad()
        sum(out.losses.values(), out.hidden.square().sum()).backward()
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert parameter.requires_grad, name
            if start and name != "to_k.bias":
                assert bool((parameter != before[name]).any()), f"{name} did not learn at {start}"


def test_a_call_of_padding_alone_forgets_no_slot_where_memory_is_empty():
    here = case(segment_length=3, memory_length=0, compressed_length=4, ratio=1)
    layer, x, valid = here.build(), here.data(2, 13), torch.ones(2, 13, dtype=torch.bool)
    valid[0, 3], valid[1, 6:9] = False, False  # behind the end of a segment, where all is compressed
    tokens = Tokens.of(valid)
    with torch.no_grad():
        expected, (steps, _) = reference(layer, x, tokens), feed(layer, x, tokens, list(range(1, 13)))
    close(steps[valid], expected[valid], "steps")


def test_losses_over_calls_are_those_of_one_call():
    layer, x = case().build(), case().data(2, 29)
    whole = layer(x).losses["reconstruction"]
    total, state = 0.0, layer.initial_state(2)
    for start, stop in ((0, 5), (5, 6), (6, 15), (15, 29)):
        out = layer(x[:, start:stop], piece(Tokens.all_valid(2, 29), start, stop), state=state)
        state = out.state
        count = sum((s + 1) * 4 - 3 >= 2 and start < (s + 1) * 4 <= stop for s in range(8))
        assert ("reconstruction" in out.losses) == bool(count), (start, stop)
        if count:
            total = total + out.losses["reconstruction"] * (stop - start)
    close(total / 29, whole, "over calls")


def test_losses_of_rows_are_those_of_the_batch():
    layer, x, valid = case().build(), case().data(3, 29), torch.ones(3, 29, dtype=torch.bool)
    valid[1, 12:], valid[2, 4:] = False, False  # the last row has nothing to lose
    each = [layer(x[row : row + 1], Tokens.of(valid[row : row + 1])).losses for row in range(3)]
    total = sum(found.get("reconstruction", 0.0) * valid[row].sum() for row, found in enumerate(each))
    close(total / valid.sum(), layer(x, Tokens.of(valid)).losses["reconstruction"], "over rows")


def test_the_loss_and_its_gradients_are_there_when_compiled():
    layer, x = case().build(), case().data(2, 29)
    expected = layer(x)
    wanted = torch.autograd.grad(expected.losses["reconstruction"], list(layer.compress.parameters()))
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    close(found.losses["reconstruction"].double(), expected.losses["reconstruction"], "compiled", 1e-6)
    (found.hidden.sum() + found.losses["reconstruction"]).backward()
    for parameter, gradient in zip(layer.compress.parameters(), wanted):
        close(parameter.grad, gradient, "compiled", 1e-6)


def test_no_loss_where_nothing_learns():
    x = case().data(1, 29)
    for options in ({"compression": "mean"}, {"compression": "most_used"}, {"reconstruction": 0.0}):
        assert not case(**options).build()(x).losses
    assert not run(case().build(), x).losses
    frozen = case().build()
    frozen.compress.requires_grad_(False)
    assert not frozen(x).losses


def test_compressed_memory_reaches_beyond_the_memory():
    """A token that XL's memory has forgotten moves outputs as long as its group is held, and no longer."""
    layer, x = case(compression="mean").build(), case().data(1, 29)  # S 4, M 3, 3 slots of 2
    other = x.clone()
    other[:, 0] += 1
    moved = (run(layer, x).hidden != run(layer, other).hidden).any(-1)[0].nonzero()[:, 0].tolist()
    # segment 2 begins its memory at 4 (5 rounded down), segment 3 at 8: groups 1, 2 and 3 are held there
    assert moved == list(range(12))


def test_its_core_is_what_the_layer_computes_between_its_projections():
    layer, x = case().build(), case().data(2, 29)
    operands = core_of(layer, Shape(2, 29, torch.device("cpu"), torch.float64)).operands
    count = layer.core(2, 29).shapes[3][2]
    groups = layer.compress(x[:, : 2 * count].unflatten(1, (-1, 2)), None)
    heads = [
        projected.unflatten(-1, (2, -1)).transpose(1, 2)
        for projected in (layer.to_q(x), layer.to_k(x), layer.to_v(x), layer.to_k(groups), layer.to_v(groups))
    ]
    assert [each.shape for each in heads] == [each.shape for each in operands[:5]]
    r = layer.to_r(layer._waves(len(operands[5]))).unflatten(-1, (2, -1))
    out = layer.to_out(layer.attend(*heads, r).transpose(1, 2).flatten(2))
    close(out, layer(x).hidden, "core")


@pytest.mark.parametrize("heads", [2, 4])
def test_the_gradients_of_its_core_are_those_of_finite_differences(heads):
    """Those of compressed keys and values among them, which no layer gets by themselves."""
    layer = case(heads=heads).build()
    shapes = layer.core(2, 29).shapes
    torch.manual_seed(0)
    operands = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert min(each.numel() for each in operands) > 0
    assert torch.autograd.gradcheck(layer.attend, operands, fast_mode=True)


def test_without_slots_and_whole_groups_it_is_transformer_xl():
    options = {"dim": 16, "heads": 2, "segment_length": 4, "memory_length": 4}
    ours = zoo.build("compressive", compressed_length=0, ratio=2, **options).double()
    theirs = zoo.build("transformer_xl", **options).double()
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if "compress" not in name})
    x = case().data(2, 29)
    close(run(ours, x).hidden, run(theirs, x).hidden, "no slots")


@pytest.mark.parametrize(
    ("option", "value"),
    [("ratio", 0), ("compression", "sum"), ("reconstruction", -1.0), ("compressed_length", -1), ("kernel", "shift")],
)
def test_wrong_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        zoo.build("compressive", dim=16, heads=2, **{option: value})
