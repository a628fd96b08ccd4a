"""Hierarchical attention: which columns are put in, who sees what through how many layers, layouts, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.hierarchical import code, of_document
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer
from attention_zoo.attention.summaries import Summaries
from attention_zoo.layout.layout import Layout
from attention_zoo.model.hierarchical import Hierarchical
from attention_zoo.model.wrapper import Nested
from attention_zoo.testing.case import close, feed

SIZE = 4


def layer(causal: bool, **options: Any) -> Hierarchical:
    torch.manual_seed(0)
    options = {"segment_length": SIZE, **options}
    made = zoo.build("hierarchical", dim=16, heads=2, causal=causal, **options)
    assert isinstance(made, Hierarchical)
    return made.double().eval()


def stack(causal: bool, layout: str, depth: int) -> Hierarchical:
    """The wrapper around a model's whole stack."""
    torch.manual_seed(0)
    attention = {"name": "hierarchical", "segment_length": SIZE, "layout": layout}
    model = Transformer(attention=attention, vocab=7, dim=16, heads=2, depth=depth, causal=causal)
    assert isinstance(model.stack, Hierarchical)
    return model.stack.double().eval()


def reads(model: Any, length: int) -> list[set[int]]:
    """For each token the tokens that its output depends on, by gradients."""
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    out = model(x).hidden
    found = []
    for i in range(length):
        (grad,) = torch.autograd.grad(out[0, i].sum() + out[0, i, 0], x, retain_graph=True)
        found.append(set(grad[0].abs().sum(-1).nonzero()[:, 0].tolist()))
    return found


def segment(i: int, length: int) -> set[int]:
    start = i // SIZE * SIZE
    return set(range(start, min(start + SIZE, length)))


def test_a_summary_stands_before_each_segment_and_causal_after_each_complete_one() -> None:
    x = torch.arange(1.0, 11)[None, :, None].expand(1, 10, 16).double()
    for causal, columns in ((False, "S1234S5678S9."), (True, "1234S5678S9.")):
        made = layer(causal)
        with torch.no_grad():
            wide, found = made._insert(x, Layout.plain(1, 10))
        wanted = columns.replace(".", "+")
        assert found.layout.position[0].tolist() == list(range(len(wanted)))
        assert found.layout.length[0].tolist() == [len(wanted)] * len(wanted)
        number = 0
        for column, what in enumerate(wanted):
            if what == "S":
                close(wide[0, column], made.summary + code(number, 16), f"causal={causal}, summary {number}")
                number += 1
            else:
                assert float(wide[0, column, 0].detach()) == (10 if what == "+" else int(what))


def test_summaries_are_counted_over_the_valid_tokens_of_each_document() -> None:
    valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1]]).bool()
    document = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])  # of five tokens, then of four
    tokens = Layout.of(Tokens.of(valid, document=document))
    x = torch.zeros(1, 12, 16).double()
    for causal, places in ((False, [(0, 0), (0, 5), (1, 0)]), (True, [(0, 4), (1, 4)])):
        _, found = layer(causal)._insert(x, tokens)
        wide = found.layout
        at = [(int(wide.document[0, c]), int(wide.position[0, c])) for c in found.target.tolist()]
        assert at == places
        assert found.number.tolist() == [position // (SIZE + 1) for _, position in places]
        there = wide.valid[0].nonzero()[:, 0].tolist()
        steps = [(int(wide.document[0, c]), int(wide.position[0, c])) for c in there]
        first = 7 if not causal else 6
        assert steps == [(0, p) for p in range(first)] + [(1, p) for p in range(5)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_within_segments_alone_nothing_else_is_seen(length: int) -> None:
    for i, seen in enumerate(reads(stack(False, "S", 3), length)):
        assert seen == segment(i, length)
    for i, seen in enumerate(reads(stack(True, "S", 3), length)):
        assert seen == {j for j in segment(i, length) if j <= i}


@pytest.mark.parametrize("layout", ["SD", "S SD", "SD S", "S D"])
@pytest.mark.parametrize("length", [4, 5, 11])
def test_one_layer_among_summaries_joins_the_document(layout: str, length: int) -> None:
    for seen in reads(stack(False, layout, len(layout.split())), length):
        assert seen == set(range(length))
    for i, seen in enumerate(reads(stack(True, layout, len(layout.split())), length)):
        assert seen == set(range(i + 1))


def test_a_segment_that_is_not_complete_has_no_causal_summary() -> None:
    """Later tokens of a segment read its earlier ones by themselves, not through a summary."""
    made, x = layer(True), torch.randn(1, 2 * SIZE, 16, dtype=torch.float64)
    with torch.no_grad():
        before = made(x).hidden
        made.summary.mul_(-3)
        after = made(x).hidden
    assert torch.equal(before[:, :SIZE], after[:, :SIZE])
    assert bool((before[:, SIZE:] != after[:, SIZE:]).any(-1).all())


def test_layouts_are_tiled_over_depth() -> None:
    for layout, depth in (("S SD", 4), ("SD", 3), ("SD SD S S", 4), ("S SD D", 6), ("S D", 2)):
        layers = stack(False, layout, depth).attentions
        kinds = ["D" if isinstance(each, Summaries) else "SD" if each.document else "S" for each in layers]
        assert kinds == (layout.split() * depth)[:depth]


def test_a_stack_is_the_loop_around_each_layer() -> None:
    """Layer after layer on columns that keep their summaries: as one layer is, without the wrapper in between."""
    model = stack(True, "S SD", 2)
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    wide, found = model._insert(x, Layout.plain(1, 11))
    expected = model.inner(wide, found.layout).hidden[:, found.columns[0]]
    close(model(x).hidden, expected, "causal stack")
    model = stack(False, "S SD", 2)
    wide, found = model._insert(x, Layout.plain(1, 11))
    hidden = model.inner(wide, found.layout).hidden
    summaries = torch.tensor([i // SIZE * (SIZE + 1) for i in range(11)])
    close(model(x).hidden, hidden[:, found.columns[0]] + hidden[:, summaries], "two-sided stack")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"layout": "S"}, {"kv_heads": 1}, {"segment_length": 1}, {"scale": 40.0}], ids=str)
def test_the_loop_under_other_options(causal: bool, options: dict[str, Any]) -> None:
    made = layer(causal, **options)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    expected = torch.stack([of_document(made, row) for row in x])
    close(made(x).hidden, expected, str(options), 1e-11)


def test_whole_segments_two_sided_are_a_reshaped_batch() -> None:
    """As the released code lays it: segments are rows of a batch, summaries every so many columns of the result."""
    made, x = layer(False), torch.randn(2, 3 * SIZE, 16, dtype=torch.float64)
    (inner,) = made.attentions

    def attend(project: Any, hidden: Tensor) -> Tensor:
        q, k, v = (
            to(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for to in (project.to_q, project.to_k, project.to_v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        answer: Tensor = project.to_out(out.transpose(1, 2).flatten(2))
        return answer

    summaries = torch.stack([made.summary + code(number, 16) for number in range(3)])[None, :, None].expand(
        2, -1, -1, -1
    )
    wide = torch.cat([summaries, x.unflatten(1, (3, SIZE))], 2)
    said = attend(inner, wide.flatten(0, 1)).unflatten(0, (2, 3))
    told = torch.nn.functional.layer_norm((wide + said)[:, :, 0], (16,))
    last = said[:, :, 0] + attend(inner.among, told)
    close(made(x).hidden, (said[:, :, 1:] + last[:, :, None]).flatten(1, 2), "reshaped")


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_among_summaries_is_dense_attention_under_its_bias(causal: bool) -> None:
    """D by itself: zeros two-sided where there is no summary; step by step it is the same."""
    torch.manual_seed(0)
    made = zoo.build("hierarchical.summaries", dim=16, heads=2, causal=causal, segment_length=SIZE).double()
    tokens = Tokens.of(torch.arange(17) >= torch.tensor([[0], [3]]), document=torch.arange(17).expand(2, -1) // 12)
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    q, k, v = (to(x).unflatten(-1, (2, 8)).transpose(1, 2) for to in (made.to_q, made.to_k, made.to_v))
    bias = made.full_bias(tokens, tokens).double()
    seen = (bias > -torch.inf).any(-1, keepdim=True)
    weights = (q @ k.mT * made.scale + bias).masked_fill(~seen, 0).softmax(-1) * seen
    expected = made.to_out((weights @ v).transpose(1, 2).flatten(2))
    there = seen[:, 0] if not causal else tokens.valid[..., None]
    found = made(x, tokens).hidden
    close(found * tokens.valid[..., None], (expected * there) * tokens.valid[..., None], "against dense")
    if causal:
        with torch.no_grad():
            steps, _ = feed(made, x, tokens, list(range(1, 17)))
        close(steps[tokens.valid], found[tokens.valid], "step by step")
    assert made.pairs(17) == float((made.full_bias(*[Tokens.all_valid(1, 17)] * 2) > -torch.inf).sum())


@pytest.mark.parametrize("layout", ["S D", "S SD D"])
def test_a_causal_stack_with_layers_among_summaries_decodes_as_it_trains(layout: str) -> None:
    model, x = stack(True, layout, 3), torch.randn(2, 19, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x).hidden
        steps, _ = feed(model, x, Tokens.all_valid(2, 19), list(range(1, 19)))
        changed = x.clone()
        changed[:, 13:] += 1
        assert torch.equal(model(changed).hidden[:, :13], whole[:, :13])
    close(steps, whole, "step by step")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["S", "SD"])
def test_pairs_are_those_of_the_definition(causal: bool, layout: str) -> None:
    made = layer(causal, layout=layout)
    for length in (1, 3, 4, 5, 13, 20):
        marks = [i % SIZE == SIZE - 1 if causal else i % SIZE == 0 for i in range(length)]
        columns = length + sum(marks)
        number = [column // (SIZE + 1) for column in range(columns)]
        summary = [column % (SIZE + 1) == (SIZE if causal else 0) for column in range(columns)]
        pairs = 0
        for i in range(columns):
            for j in range(i + 1 if causal else columns):
                pairs += number[i] == number[j]
                pairs += layout == "SD" and summary[j] and (causal or summary[i])
        assert made.pairs(length) == pairs


def test_a_state_holds_one_segment_and_a_key_for_each_summary() -> None:
    made, x = layer(True), torch.randn(1, 400, 16, dtype=torch.float64)
    state = made.initial_state(1)
    with torch.no_grad():
        _, state = feed(made, x, Tokens.all_valid(1, 400), list(range(50, 400, 50)), state)
    assert isinstance(state, Nested)
    held = state.inner
    live = int(held.columns.tokens.valid.sum())
    assert live <= (SIZE + 1) + 32 + 51 * (SIZE + 1) // SIZE  # the segment, room to forget into, the last call
    assert int(held.summaries.tokens.valid.sum()) == 100
    fresh, _ = feed(layer(True, layout="S"), x, Tokens.all_valid(1, 400), [399])
    assert fresh.shape == (1, 400, 16)


def test_the_summary_learns_and_is_of_both_segments_and_number() -> None:
    for causal in (False, True):
        made = layer(causal).train()
        made(torch.randn(1, 11, 16, dtype=torch.float64)).hidden.square().sum().backward()
        assert made.summary.grad is not None
        assert bool(made.summary.grad.ne(0).all())
    # the same segments in another order: numbers tell them apart
    x: Tensor = torch.randn(1, 8, 16, dtype=torch.float64)
    made = layer(False)
    with torch.no_grad():
        one, other = made(x).hidden, made(x.roll(SIZE, 1)).hidden.roll(-SIZE, 1)
    assert not torch.allclose(one, other)


WRONG = [
    ({"layout": "D"}, "layout must hold an S, without which no summary reads its segment, got 'D'"),
    ({"layout": "DS"}, "layout must be words S, SD and D, one a layer, got 'DS'"),
    ({"layout": "S,SD"}, "layout must be words S, SD and D"),
    ({"layout": "S SD"}, "layout must be one word around a single layer, got 'S SD'"),
    ({"segment_length": 0}, "segment_length must be an integer of at least 1, got 0"),
    ({"segment_length": 2**17}, "segment_length must be at most 65536"),
    ({"positions": "rotary"}, "positions=rotary is not supported"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(True, **options)


def test_a_model_of_it_is_rebuilt_from_its_config() -> None:
    attention = {"name": "hierarchical", "segment_length": SIZE, "layout": "S D"}
    torch.manual_seed(0)
    model = Transformer(attention=attention, vocab=7, dim=16, heads=2, depth=2)
    again = Transformer(**model.config)
    again.load_state_dict(model.state_dict())
    ids = torch.randint(0, 7, (1, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert [getattr(each, "document", None) for each in again.stack.attentions] == [False, None]
