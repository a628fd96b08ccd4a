"""Calls that hand a state on: any cut gives the same, streams stay apart, states are small and pliable."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import CARRYING, PREFIX, REVERSIBLE, VOCAB, entry, far, in_pieces, packed, ragged, small, some_ids

from attention_zoo import Tokens, Transformer, Unsupported
from attention_zoo.model import Running, detach, reorder, state_bytes
from attention_zoo.model.short_conv import GatedConvolution, ShortConvolution

CUTS = [[5, 13, 14, 20], [1], [22], list(range(1, 23))]


@pytest.mark.parametrize(
    ("cuts", "reversible"), [*((cuts, False) for cuts in CUTS), (CUTS[0], True), (CUTS[-1], True)], ids=str
)
@pytest.mark.parametrize("name", PREFIX)
def test_pieces_equal_the_whole(name, cuts, reversible):
    if reversible and name not in REVERSIBLE:
        with pytest.raises(Unsupported, match=f"{name}: reversible is not supported"):
            small(name, reversible=True)
        return
    model = small(name, short_conv=3, reversible=reversible)
    ids = some_ids()
    assert far(in_pieces(model, ids, None, cuts), model(ids).logits) < 1e-10


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("names", [(name,) for name in PREFIX] + [tuple(PREFIX)], ids="/".join)
def test_pieces_equal_the_whole_with_padding_holes_and_documents(names, cuts):
    model = small(*names, short_conv=4, depth=max(2, len(names)))
    ids = some_ids()
    valid = torch.stack([ragged(23, [18], "left")[0], ragged(23, [19], "right")[0], torch.ones(23, dtype=torch.bool)])
    valid[2, [3, 4, 13]] = False
    tokens = packed(valid, 6, 14)
    whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, cuts)[valid], whole[valid]) < 1e-10


@pytest.mark.parametrize("name", CARRYING)
def test_every_call_of_one_layer_ends_the_whole_prefix(name):
    model = small(name, depth=1)
    ids = some_ids()
    state = model.initial_state(3)
    for start, stop in ((0, 6), (6, 7), (7, 16), (16, 23)):
        out = model(ids[:, start:stop], state=state)
        state = out.state
        assert far(out.logits, model(ids[:, :stop]).logits[:, start:]) < 1e-10


@pytest.mark.parametrize("name", CARRYING)
def test_fresh_rows_see_nothing_of_their_state(name):
    model = small(name, short_conv=3, depth=1)
    first, second, third = some_ids(length=9), some_ids(length=6, seed=1), some_ids(length=5, seed=2)
    fresh = torch.tensor([False, True, False])
    state = model(first, state=model.initial_state(3)).state
    mixed = model(second, state=state, fresh=fresh)
    going_on = model(second, state=state)
    alone = model(second, state=model.initial_state(3))
    assert far(mixed.logits[1], alone.logits[1]) < 1e-12
    assert far(mixed.logits[[0, 2]], going_on.logits[[0, 2]]) < 1e-12
    assert far(mixed.logits[1], going_on.logits[1]) > 1e-6
    # and the row goes on from there
    later = model(third, state=mixed.state).logits
    assert far(later[1], model(third, state=alone.state).logits[1]) < 1e-12
    assert far(later[0], model(third, state=going_on.state).logits[0]) < 1e-12
    assert mixed.state.next.tolist() == [15, 6, 15]


def test_fresh_on_the_first_call_and_without_a_state_changes_nothing():
    model, ids = small("full"), some_ids()
    fresh = torch.tensor([True, False, True])
    plain = model(ids, state=model.initial_state(3))
    assert torch.equal(model(ids, state=model.initial_state(3), fresh=fresh).logits, plain.logits)
    assert far(model(ids, fresh=fresh).logits, plain.logits) < 1e-12


def test_document_numbers_count_over_the_stream():
    model = small("full", short_conv=3)
    ids = some_ids()
    tokens = packed(torch.ones_like(ids, dtype=torch.bool), 9)
    whole = model(ids, tokens).logits
    # cut exactly at the border: the higher number alone says that a new document starts
    assert far(in_pieces(model, ids, tokens, [9]), whole) < 1e-10
    # tokens=None goes on with the document that is open
    state = model(ids[:, :14], tokens.cut(slice(14)), state=model.initial_state(3)).state
    assert far(model(ids[:, 14:], state=state).logits, whole[:, 14:]) < 1e-10
    with pytest.raises(ValueError, match="document must not fall from one call to the next, got 0 after 1 in row 0"):
        model(ids[:, 14:], tokens.cut(slice(0, 9)), state=state)
    # a fresh row may count from 0 again, and go on with 0
    fresh = torch.ones(3, dtype=torch.bool)
    out = model(ids[:, :4], tokens.cut(slice(0, 4)), state=state, fresh=fresh)
    assert far(out.logits, whole[:, :4]) < 1e-10
    assert far(model(ids[:, 4:], tokens.cut(slice(4, 23)), state=out.state).logits, whole[:, 4:]) < 1e-10


def test_rows_without_a_token_in_a_call_keep_their_place():
    model = small("full", short_conv=3)
    ids = some_ids(2, 10)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4:7] = False
    tokens = Tokens.of(valid)
    whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, [4, 7])[valid], whole[valid]) < 1e-10


@pytest.mark.parametrize("name", CARRYING)
def test_states_are_reordered_and_detached(name):
    model = small(name, short_conv=3)
    ids, more, index = some_ids(length=9), some_ids(length=5, seed=1), torch.tensor([2, 0, 0, 1])
    state = model(ids, Tokens.of(ragged(9, [9, 5, 2], "right")), state=model.initial_state(3)).state
    assert isinstance(state, Running)
    straight = model(more, state=state).logits
    assert far(model(more[index], state=reorder(state, index)).logits, straight[index]) < 1e-12
    cut = detach(state)
    assert type(cut.layers[0][0]) is type(state.layers[0][0])
    loss = model(more, state=cut).logits.square().mean()
    loss.backward()
    assert torch.isfinite(model.embedding.weight.grad).all()
    # nothing of the first call is left in the graph: a second backward of another loss works
    model(more, state=cut).logits.mean().backward()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CARRYING)
def test_rows_that_had_padding_alone_begin_when_they_are_picked(name, gradients):
    model = small(name, short_conv=3)
    ids, more = some_ids(length=4), some_ids(length=6, seed=1)
    with torch.set_grad_enabled(gradients):
        for side in ("left", "right"):
            valid = ragged(4, [4, 0, 0], side)
            state = model(ids, Tokens.of(valid), state=model.initial_state(3)).state
            for index in ([1], [2, 1], [1, 0], []):
                picked = reorder(state, torch.tensor(index, dtype=torch.long))
                want = model(more[index[:1]]).logits
                for cut in (1, 2, 6):
                    first = model(more[index, :cut], state=picked)
                    rest = model(more[index, cut:], state=first.state).logits if cut < 6 else first.logits[:, :0]
                    got = torch.cat([first.logits, rest], 1)[: 1 if index else 0]
                    assert far(got[:, -1], want[:, -1]) < 1e-10
                    if name in PREFIX:
                        assert far(got, want) < 1e-10


def test_state_bytes_count_whole_storages_once():
    base = torch.zeros(100, dtype=torch.float32)
    assert state_bytes(Running((base[:1], base[50:]), base, {"a": base}, [torch.zeros(3, dtype=torch.int64)])) == 424
    assert state_bytes(None) == 0


def test_a_window_keeps_a_constant_state_and_full_attention_a_growing_one():
    def held(name: str, length: int) -> int:
        model = Transformer(attention=entry(name), vocab=VOCAB, dim=16, heads=2, short_conv=3)
        state = model.initial_state(1)
        for start in range(0, length, 32):
            state = detach(model(some_ids(1, 32, seed=start), state=state).state)
        return state_bytes(state)

    assert held("longformer", 256) == held("longformer", 128)
    assert held("transformer_xl", 256) == held("transformer_xl", 128)
    assert held("full", 256) > 1.8 * held("full", 128)


def test_models_that_carry_nothing_say_so():
    model = small("full", causal=False)
    assert not model.carries
    assert small("full").carries
    with pytest.raises(Unsupported, match="state is not supported: it is two-sided"):
        model.initial_state(2)


# --- short convolution -----------------------------------------------------------------------------------------------


def convolved(layer, x, tokens):
    """The definition, token by token."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        seen: dict[int, list[torch.Tensor]] = {}
        for column in range(x.shape[1]):
            if tokens.valid[row, column]:
                past = seen.setdefault(int(tokens.document[row, column]), [])
                past.append(x[row, column])
                taps = [layer.weight[tap] * past[-1 - tap] for tap in range(min(layer.width, len(past)))]
                out[row, column] = x[row, column] + sum(taps)
    return out


@pytest.mark.parametrize("width", [1, 2, 5])
def test_short_convolution_is_its_definition(width):
    layer = ShortConvolution(dim=4, width=width).double()
    x = torch.randn(4, 13, 4, dtype=torch.float64)
    valid = torch.rand(4, 13) < 0.7
    valid[3] = True
    tokens = packed(valid, 3, 4, 9)
    poisoned = torch.where(valid[..., None], x, torch.nan)
    out = layer(poisoned, tokens).hidden
    assert torch.isfinite(out).all()
    assert far(out[valid], convolved(layer, x, tokens)[valid]) < 1e-12
    plain = layer(x).hidden
    assert far(plain, convolved(layer, x, Tokens.all_valid(4, 13))) < 1e-12


@pytest.mark.parametrize("borders", [(), (4, 9)], ids=["one document", "packed"])
@pytest.mark.parametrize(
    "counts", [[[0, 13], [0, 7], [0, 1]], [[0, 13], [5, 13], [12, 13]], [[0, 9], [3, 13], [4, 11]]]
)
def test_short_convolution_beside_padding_at_an_end_is_its_definition(counts, borders):
    """Without a hole nothing is moved: outputs, zeros at padding, gradients."""
    layer = ShortConvolution(dim=4, width=4).double()
    column = torch.arange(13)
    valid = torch.stack([(column >= first) & (column < end) for first, end in counts])
    tokens = packed(valid, *borders)
    x = torch.where(valid[..., None], torch.randn(3, 13, 4, dtype=torch.float64), torch.nan).requires_grad_()
    given = torch.randn(3, 13, 4, dtype=torch.float64)
    out, right = layer(x, tokens).hidden, convolved(layer, x, tokens)
    assert far(out[valid], right[valid]) < 1e-12
    assert not out[~valid].any()
    found = torch.autograd.grad((out * given).sum(), (x, layer.weight))
    asked = torch.autograd.grad((right * given)[valid].sum(), (x, layer.weight))
    assert far(found[0][valid], asked[0][valid]) < 1e-12
    assert not found[0][~valid].any()
    assert far(found[1], asked[1]) < 1e-12


def test_gated_convolution_is_a_convolution_times_a_projection():
    layer = GatedConvolution(dim=4, width=3).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    tokens = Tokens.all_valid(2, 9)
    mixed = convolved(layer, x, tokens) - x
    assert far(layer(x, tokens).hidden, x + (mixed + layer.bias) * layer.gate(x)) < 1e-12
    assert far(layer(x).hidden, layer(x, tokens).hidden) < 1e-12


@pytest.mark.parametrize("name", PREFIX)
def test_pieces_equal_the_whole_behind_a_gated_convolution_and_without_feed_forward(name):
    model = small(name, short_conv={"name": "gated", "width": 3}, feed_forward="none", ff_mult=None, depth=1)
    assert [type(branch.body.layers[-1]) for branch in model.stack.branches] == [GatedConvolution, type(attend(model))]
    ids = some_ids()
    tokens = packed(ragged(23, [18, 23, 20], "left"), 6, 14)
    whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, [1, 5, 13])[tokens.valid], whole[tokens.valid]) < 1e-10


def attend(model):
    """The mechanism of the first block."""
    return model.stack.attentions[0]


def test_short_convolution_state_holds_no_more_than_it_needs():
    layer = ShortConvolution(dim=4, width=4)
    state = layer(torch.randn(2, 50, 4), Tokens.all_valid(2, 50), state=layer.initial_state(2)).state
    assert state.hidden.shape == (2, 3, 4)
    assert state_bytes(state.hidden) == 2 * 3 * 4 * 4


COPIES = {
    "reorder": lambda pair: reorder(pair, torch.tensor([0])),
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "detach": detach,
}


@pytest.mark.parametrize("copied", sorted(COPIES))
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird", "transformer_xl", "reformer"])
def test_two_states_of_one_chain_that_are_copied_together_go_their_own_ways(name: str, copied: str) -> None:
    """What they share stays shared: the older one must not write where the newer one holds something."""
    torch.manual_seed(0)
    model = Transformer(attention=name, vocab=31, dim=16, depth=2, heads=2, positions="none").double().eval()
    ids = torch.randint(0, 31, (1, 14))
    with torch.no_grad():
        chain = [model(ids[:, :8], state=model.initial_state(1)).state]
        for at in range(8, 13):
            chain.append(model(ids[:, at : at + 1], state=chain[-1]).state)
        whole = model(ids).logits
        for first in range(4):
            old, new = COPIES[copied]([chain[first], chain[-1]])
            other = Tokens.of(torch.tensor([[False, True, False]]))
            model(ids[:, :3], other, state=old)
            assert (model(ids[:, 13:], state=new).logits - whole[:, 13:]).abs().max() < 1e-12
            for at in range(8 + first, 13):
                old = model(ids[:, at : at + 1], state=old).state
            assert (model(ids[:, 13:], state=old).logits - whole[:, 13:]).abs().max() < 1e-12
