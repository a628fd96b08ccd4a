"""Shortened stacks: fewer tokens in the middle, and nothing else that a caller could tell."""

from __future__ import annotations

import pickle

import pytest
import torch
from references.shorten import reference
from small_models import CAUSAL, PREFIX, TWO_SIDED, VOCAB, entry, far, in_pieces, packed, ragged, small, some_ids

import attention_zoo as zoo
from attention_zoo import Tokens, Unsupported
from attention_zoo.integrations.weights.lengthen import lengthen
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.windows import windows
from attention_zoo.model import detach, generate, reorder, state_bytes
from attention_zoo.model.block import attentions

FLAT, DEEP = "1@1 1@3 1@1", "1@1 1@2 1@4 1@2 1@1"
KINDS = [("mean", "repeat"), ("linear", "linear"), ("attention", "attention")]
FUNNELS = ["1@1 1@3 1@1", "1@1 1@2 1@4 1@1"]


def hourglass(layout=FLAT, pool="linear", up="linear", **options):
    return {"name": "hourglass", "layout": layout, "pool": pool, "up": up, "reach": 2, **options}


def funnel(layout="1@1 1@2 1@4 1@1", **options):
    return {"name": "funnel", "layout": layout, **options}


def everywhere(length=23):
    """Tokens with padding on either side, holes, and documents that end in the middle of groups."""
    valid = torch.stack([ragged(length, [18], "left")[0], ragged(length, [19], "right")[0], torch.ones(length) > 0])
    valid[2, [3, 4, 13]] = False
    return valid, packed(valid, 6, 14)


def stacked(shorten, causal, tokens, seed=3, **options):
    """A stack, hidden states, and what its definition makes of them."""
    torch.manual_seed(seed)
    model = small("full", shorten=shorten, causal=causal, head="hidden", **options)
    for parameter in model.parameters():
        parameter.data.mul_(1.7)
    x = torch.randn(*tokens.valid.shape, 16, dtype=torch.float64, requires_grad=True)
    return model.stack, x


@pytest.mark.parametrize("layout", [FLAT, DEEP])
@pytest.mark.parametrize("kinds", [*KINDS, ("mean", "attention"), ("attention", "repeat")], ids="-".join)
@pytest.mark.parametrize("causal", [True, False])
def test_hourglass_equals_its_definition(causal, kinds, layout):
    compare(hourglass(layout, *kinds), causal)


@pytest.mark.parametrize("keys", ["pooled", "all"])
@pytest.mark.parametrize("layout", FUNNELS)
def test_funnel_equals_its_definition(layout, keys):
    compare(funnel(layout, keys=keys), False, pre_norm=keys == "pooled")


@pytest.mark.parametrize("causal", [True, False])
def test_heads_may_be_grouped_at_every_level(causal):
    grouped = [{"name": "full", "kv_heads": 1}, {**entry("longformer"), "kv_heads": 1, "global_projections": "shared"}]
    compare(hourglass(DEEP, "attention", "attention"), causal, attention=grouped)
    if causal:
        model, ids = small("full", shorten=DEEP, attention=grouped), some_ids()
        assert far(in_pieces(model, ids, None, [4, 5, 11]), model(ids).logits) < 1e-10
    else:
        compare(funnel(keys="all"), causal, attention=grouped[0], pre_norm=False)


def compare(shorten, causal, **options):
    _, tokens = everywhere()
    for given in (
        tokens,
        Tokens.of(torch.ones(2, 10, dtype=torch.bool)),
        Tokens.of(torch.ones(1, 1, dtype=torch.bool)),
    ):
        stack, x = stacked(shorten, causal, given, **options)
        weight = torch.randn_like(x) * given.valid[..., None]
        fast, slow = stack(x, given).hidden, reference(stack, x, given)
        assert far(fast[given.valid], slow[given.valid]) < 1e-11
        leaves = [x, *stack.parameters()]
        found = torch.autograd.grad((fast * weight).sum(), leaves)
        for one, two in zip(found, torch.autograd.grad((slow * weight).sum(), leaves)):
            assert far(one, two) < 1e-9 * max(1, float(two.abs().max()))
        assert not found[0][~given.valid].any()


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_a_group_are_run(causal, kinds):
    """Rows of padding alone, and such that begin inside a group and end before the next one."""
    valid = torch.tensor([[False, True, False], [False, False, False]])
    for given in (Tokens.of(valid & False), Tokens.of(valid, start=5)):
        stack, x = stacked(hourglass(FLAT, *kinds), causal, given)
        out = stack(x, given).hidden
        (found,) = torch.autograd.grad((out * given.valid[..., None]).square().sum(), x)
        assert found.isfinite().all()
        assert bool(found[given.valid].any()) == bool(given.valid.any())
        assert not found[~given.valid].any()
        token = given.cut(slice(1, 2))
        assert far(out[:, 1][token.valid[:, 0]], stack(x[:, 1:2], token).hidden[token.valid]) < 1e-12


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("layout", [FLAT, DEEP])
def test_every_length_in_pieces_and_at_once(layout, kinds):
    model = small("longformer", shorten=hourglass(layout, *kinds), positions="rotary")
    ids = some_ids()
    whole = model(ids).logits
    for length in range(1, 12):
        assert far(model(ids[:, :length]).logits, whole[:, :length]) < 1e-11, length
    # the steps of a shorter text are the first of these
    assert far(in_pieces(model, ids[:, :11], None, list(range(1, 11))), whole[:, :11]) < 1e-11


@pytest.mark.parametrize("name", CAUSAL)
def test_the_past_is_bitwise_blind_to_the_future(name):
    if zoo.registry.recipe(name)[0].declared.causality != "strict":
        pytest.skip("its own choices depend on what follows")
    model = small(name, shorten=hourglass(DEEP, "attention", "attention")).float()
    ids = some_ids()
    valid, tokens = everywhere()
    columns = range(1, 23)  # all in one batch: what is compared has the same shape and stands in the same place of it
    others = [torch.where(torch.arange(23) < column, ids, (ids + 3) % VOCAB) for column in columns]
    for given, here in ((None, torch.ones_like(valid)), (tokens, valid)):
        many = given and Tokens(*(torch.cat([field] * len(others)) for field in given))
        with torch.no_grad():
            out = model(ids.repeat(len(others), 1), many).logits.split(3)
            found = model(torch.cat(others), many).logits.split(3)
        for column, one, other in zip(columns, out, found, strict=True):
            past = here[:, :column]
            assert torch.equal(other[:, :column][past], one[:, :column][past]), column


def test_a_token_does_read_its_group():
    """What the shift is for: the newest token that a group holds is the first that reads it."""
    model, ids = small("full", shorten=FLAT), some_ids()
    x = torch.randn(1, 23, 16, dtype=torch.float64, requires_grad=True)
    level = model.stack
    level.before, level.after, level.inside = (torch.nn.Identity(),) * 3
    at = windows(Layout.plain(1, 23), 3, causal=True)
    out = level.up(x * 0, level.pool(x, None, at), None, at)
    for p in range(23):
        (grad,) = torch.autograd.grad(out[0, p].sum(), x, retain_graph=True)
        held = grad[0].abs().sum(1).nonzero()[:, 0].tolist()
        first = p // 3 * 3
        assert held == [at for at in range(first - 2, first + 1) if at >= 0]
    assert ids.shape == (3, 23)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_between_levels_reads_what_is_near(causal):
    """A group its own k tokens; a token `reach` groups back, and as many on where it may."""
    size, reach, length = 3, 2, 23
    level = small("full", shorten=hourglass(FLAT, "attention", "attention"), causal=causal).stack
    at = windows(Layout.plain(1, length), size, causal=causal, reach=reach)
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, at.groups.valid.shape[1], 16, dtype=torch.float64, requires_grad=True)
    pooled, out = level.pool(x, None, at), level.up(x, y, None, at)
    for group in range(y.shape[1]):
        first = group * size - (size - 1) * causal
        expected = [column for column in range(first, first + size) if 0 <= column < length]
        assert read(pooled[0, group], x) == expected
    for token in range(length):
        own = token // size
        last = own if causal else min(y.shape[1] - 1, own + reach - 1)
        assert read(out[0, token], y) == list(range(max(0, own - reach + 1), last + 1))


def read(out, given):
    (grad,) = torch.autograd.grad(out.square().sum(), given, retain_graph=True)
    return grad[0].abs().sum(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_a_reach_over_all_groups_is_the_attention_of_the_paper(causal):
    """u + attention of u over all groups up to its own, two-sided over all."""
    level = small("full", shorten=hourglass(FLAT, "mean", "attention"), causal=causal).stack
    at = windows(Layout.plain(2, 23), 3, causal=causal, reach=64)
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    y = torch.randn(2, 8, 16, dtype=torch.float64)
    own = torch.arange(23) // 3
    u = x + level.up.linear(y).view(2, -1, 16)[:, :23]
    over = level.up.over
    k, v = over.keys(over.norm_keys(y)).chunk(2, -1)
    q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in (over.query(over.norm(u)), k, v))
    mask = (torch.arange(8) <= own[:, None]) if causal else None
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = u + over.out(seen.transpose(1, 2).flatten(2))
    assert far(level.up(x, y, None, at), expected) < 1e-12


@pytest.mark.parametrize("cuts", [[5, 13, 14, 20], [1], list(range(1, 23))], ids=len)
@pytest.mark.parametrize("name", PREFIX)
def test_pieces_equal_the_whole_with_padding_holes_and_documents(name, cuts):
    model = small(name, shorten=hourglass(DEEP, "linear", "attention"), short_conv=3)
    ids = some_ids()
    valid, tokens = everywhere()
    whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, cuts)[valid], whole[valid]) < 1e-10
    assert far(in_pieces(model, ids, None, cuts[:9]), model(ids).logits) < 1e-10


@pytest.mark.parametrize(("name", "causal"), [(n, True) for n in CAUSAL] + [(n, False) for n in TWO_SIDED])
def test_padding_and_packing_change_nothing(name, causal):
    """Each document alone, wherever it stands."""
    model = small(name, shorten=hourglass(DEEP, "attention", "linear"), causal=causal)
    ids = some_ids()
    valid, tokens = everywhere()
    if zoo.registry.recipe(name)[0].declared.causality == "values" and causal:
        tokens = Tokens.of(valid)  # buckets of a document depend on the length of the row
    out = model(ids, tokens).logits
    assert out.isfinite().all()
    for row in range(3):
        for document in tokens.document[row][valid[row]].unique().tolist():
            columns = (valid[row] & (tokens.document[row] == document)).nonzero()[:, 0]
            assert far(out[row, columns], model(ids[row, columns][None]).logits[0]) < 1e-10


@pytest.mark.parametrize("name", zoo.available())
def test_half_precision_and_training(name):
    causal = name in CAUSAL
    model = small(name, shorten=hourglass(FLAT, "attention", "attention"), causal=causal).to(torch.bfloat16).train()
    valid, tokens = everywhere()
    out = model(some_ids(), tokens).logits
    assert out.isfinite().all()
    assert out.dtype == torch.bfloat16
    out[valid].float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    between = [*model.stack.pool.parameters(), *model.stack.up.parameters()]
    assert between
    assert all(p.grad is not None for p in between)
    exact = small(name, shorten=hourglass(FLAT, "attention", "attention"), causal=causal)(some_ids(), tokens).logits
    if zoo.registry.recipe(name)[0].declared.causality != "values":
        assert far(out[valid].double(), exact[valid]) < 0.3


def test_a_state_is_pliable_and_small():
    model, ids = small("longformer", shorten=hourglass(DEEP, "linear", "attention")), some_ids()
    whole = model(ids).logits
    state = model(ids[:, :10], state=model.initial_state(3)).state
    expected = whole[:, 10:]
    for other in (detach(state), pickle.loads(pickle.dumps(state)), reorder(state, torch.arange(3))):
        assert far(model(ids[:, 10:], state=other).logits, expected) < 1e-10
    order = torch.tensor([2, 0])
    assert far(model(ids[order, 10:], state=reorder(state, order)).logits, expected[order]) < 1e-10
    fresh = torch.tensor([False, True, False])
    out = model(ids[:, 10:], state=state, fresh=fresh).logits
    assert far(out[1], model(ids[1:2, 10:]).logits[0]) < 1e-10
    assert far(out[0], expected[0]) < 1e-10
    state = model.initial_state(1)
    sizes = []
    with torch.no_grad():
        for _ in range(200):
            state = model(ids[:1, :1], state=state).state
            sizes.append(state_bytes(state))
    assert max(sizes[100:]) <= 2 * sizes[60]


def test_between_two_groups_nothing_inside_runs():
    model, ids = small("full", shorten=hourglass("1@1 2@4 1@1")), some_ids()
    calls = []
    model.stack.inside.register_forward_hook(lambda *given: calls.append(1))
    state = model.initial_state(3)
    for at in range(9):
        state = model(ids[:, at : at + 1], state=state).state
    assert len(calls) == 3


def test_what_a_cached_group_costs():
    """A full stack's state holds a quarter of the columns in the middle."""
    ids = some_ids(1, 401)
    held = {}
    for shorten in (None, "1@1 6@4 1@1"):
        model = small("full", shorten=shorten, depth=8)
        with torch.no_grad():
            held[shorten] = state_bytes(detach(model(ids, state=model.initial_state(1)).state))
    assert held["1@1 6@4 1@1"] < 0.5 * held[None]


def test_mechanisms_are_tiled_over_depth_and_depth_is_their_sum():
    model = small("longformer", "full", shorten="1@1 3@2 1@1")
    assert [each.name for each in attentions(model.stack)] == ["longformer", "full"] * 2 + ["longformer"]
    assert model.config["depth"] == 5
    assert small("longformer", "full", shorten="1@1 3@2 1@1", depth=9).config["depth"] == 5


def test_saved_and_loaded(tmp_path):
    ids = some_ids()
    for name, shorten, causal in (
        ("longformer", hourglass(DEEP, "attention", "attention"), True),
        ("longformer", funnel(), False),
        ("full", funnel(keys="all"), False),
    ):
        model = small(name, shorten=shorten, causal=causal, pre_norm=name != "full")
        again = zoo.load(zoo.save(model, tmp_path / "model"))
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config == model.config


def test_a_short_model_made_long():
    model, ids = small("full", shorten=DEEP, positions="learned", max_length=40), some_ids()
    long = lengthen(model, attention="longformer", window=60, max_length=80)
    assert {each.name for each in long.stack.attentions} == {"longformer"}
    assert far(long(ids).logits, model(ids).logits) < 1e-12


def test_what_a_stack_shares_over_depth_it_shares_over_levels():
    model = small("transformer_xl", shorten=DEEP)
    names = {name for each in attentions(model.stack) for name in getattr(each, "shared_over_depth", ())}
    for name in names:
        assert len({id(getattr(each, name)) for each in attentions(model.stack)}) == 1
    assert names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
def test_compiled():
    torch._dynamo.reset()
    model = small("full", shorten=hourglass(FLAT, "attention", "attention"))
    compiled = torch.compile(model, backend="aot_eager")
    for length in (23, 10):
        ids = some_ids(length=length)
        assert far(compiled(ids).logits, model(ids).logits) < 1e-11
    _, tokens = everywhere()
    assert far(compiled(some_ids(), tokens).logits, model(some_ids(), tokens).logits) < 1e-11


def test_a_half_of_an_encoder_decoder_is_shortened():
    encoder = small("full", shorten=funnel(), causal=False, head="hidden")
    model = zoo.EncoderDecoder(encoder=encoder, decoder=small("full", shorten=FLAT, cross=True))
    source, ids = some_ids(2, 13), some_ids(2, 9)
    found, _ = model.encode(source)
    whole = model.decoder(ids, source=found).logits
    state, pieces = model.decoder.initial_state(2), []
    for at in range(9):
        out = model.decoder(ids[:, at : at + 1], state=state, source=None if at else found)
        state = out.state
        pieces.append(out.logits)
    assert far(torch.cat(pieces, 1), whole) < 1e-10


def test_wrappers_stand_around():
    model, ids = small("longformer", shorten=DEEP, around=["global_tokens"]), some_ids()
    whole = model(ids).logits
    valid, tokens = everywhere()
    assert far(in_pieces(model, ids, None, [4, 5, 11]), whole) < 1e-10
    packed_whole = model(ids, tokens).logits
    assert far(in_pieces(model, ids, tokens, [4, 5, 11])[valid], packed_whole[valid]) < 1e-10


def test_generation_goes_through():
    model, ids = small("full", shorten=DEEP), some_ids(2, 5)
    text = torch.cat([ids, generate(model, ids, steps=9, greedy=True)], 1)
    follows = model(text).logits.argmax(-1)
    assert torch.equal(text[:, 5:], follows[:, 4:-1])


def test_a_refilled_mask_is_harmless():
    valid, tokens = everywhere()
    stack, x = stacked(hourglass(DEEP, "attention", "attention"), True, tokens)
    out = stack(x, tokens).hidden
    weight = torch.randn_like(x) * valid[..., None]
    (expected,) = torch.autograd.grad((out * weight).sum(), x)
    again = Tokens(*(field.clone() for field in tokens))
    out = stack(x, again).hidden
    for field in again:
        field.zero_()
    (found,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("head", ["classify", "tokens"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_funnel_has_a_decoder_where_tokens_answer(head, pooling):
    layout = "1@1 1@2 1@4" + " 1@1" * (head == "tokens")
    model = small("full", shorten=funnel(layout), causal=False, head=head, classes=3, pooling=pooling)
    valid, tokens = everywhere()
    tokens = Tokens.of(valid)
    out = model(some_ids(), tokens).logits
    row = model(some_ids()[:1, valid[0]]).logits
    assert far(out[:1] if head == "classify" else out[:1, valid[0]], row) < 1e-11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shorten": "2@1"}, "shorten must list 2 to 32 parts, layers@factor, the first at factor 1"),
        ({"shorten": "2@2 1@4 2@2"}, "the first at factor 1"),
        ({"shorten": "2@1 8x3 2@1"}, "got '2@1 8x3 2@1'"),
        ({"shorten": "2@1 0@3 2@1"}, "layers@factor"),
        ({"shorten": "2@1 8@3"}, "factors of a palindrome"),
        ({"shorten": "1@1 1@2 1@3 1@2 1@1"}, "got 3 after 2"),
        ({"shorten": "1@1 1@1 1@1"}, "got 1 after 1"),
        ({"shorten": 3}, "shorten must be a word"),
        ({"shorten": {"name": "hourglass"}}, "needs a layout"),
        ({"shorten": {"name": "sandglass", "layout": FLAT}}, "shorten must be one of hourglass, funnel"),
        ({"shorten": {**hourglass(), "pool": "max"}}, "pool must be one of mean, linear, attention, got 'max'"),
        ({"shorten": {**hourglass(), "reach": 0}}, "reach must be an integer of at least 1"),
        ({"shorten": {**hourglass(), "shift": 1}}, "shorten=hourglass has no option shift"),
        ({"shorten": {**funnel(), "pool": "mean"}, "causal": False}, "shorten=funnel has no option pool"),
        ({"shorten": funnel(keys="none"), "causal": False}, "keys must be one of pooled, all, got 'none'"),
        ({"shorten": funnel("1@1 1@2"), "causal": False}, "needs a decoder"),
        ({"shorten": funnel("1@1 1@1"), "causal": False}, "a factor above 1"),
        ({"shorten": funnel("1@1 1@4 1@2 1@1"), "causal": False}, "got 2 after 4"),
    ],
)
def test_wrong_layouts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small("full", **options)


def test_what_is_not_supported_says_so():
    with pytest.raises(Unsupported, match="shorten=funnel: causal=True is not supported"):
        small("full", shorten=funnel())
    with pytest.raises(Unsupported, match="shorten=hourglass: reversible=True is not supported"):
        small("full", shorten=FLAT, reversible=True)
    for options, message in (
        ({}, "pre_norm=True is not supported"),
        ({"pre_norm": False, "cross": True}, "cross=True is not supported"),
        ({"pre_norm": False, "positions": "rotary"}, "positions=rotary is not supported"),
    ):
        with pytest.raises(Unsupported, match=message):
            small("full", shorten=funnel(keys="all"), causal=False, **options)
    with pytest.raises(Unsupported, match="longformer: cross=True is not supported"):
        small("longformer", shorten=funnel(keys="all"), causal=False, pre_norm=False)
    mixed = small("longformer", "full", shorten=funnel("1@1 2@2 2@1", keys="all"), causal=False, pre_norm=False)
    assert [getattr(each, "cross", False) for each in mixed.stack.attentions] == [False, True, False, False, False]
    with pytest.raises(ValueError, match="state must be of a model"):
        small("full", shorten=FLAT)(some_ids(), state=small("full").initial_state(3))
    with pytest.raises(ValueError, match="state must be of a model"):
        small("full")(some_ids(), state=small("full", shorten=FLAT).initial_state(3))
