"""What a layer asks of the host on the path of CUDA, counted on CPU tensors with the launches left out.

With kernel=auto, over the options of each constructor (launch_options.py) in every layout: 60 operators forward and 40
backward besides the projections, once a layout is planned. What takes more stands in `MORE`, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from count_reads import layouts
from launch_options import NOT_COUNTED, cases, values_of
from launches import added, counted, without_launches
from recorded import NEWER, RECORDED

import attention_zoo as zoo
from attention_zoo.layout.layout import Layout
from attention_zoo.registry import abilities, options_of

pytest.importorskip("triton", reason="triton is not installed")

MECHANISMS = [*RECORDED, *NEWER]
FORWARD, BACKWARD = 60, 40
"""Operators that a layer adds to its projections, at most, once its layout is planned."""


class More(NamedTuple):
    """Calls that take more, and how many at most.

    Fields:
        where: what all of their options hold.
        layout: what the name of their layout holds.
    """

    name: str
    where: dict[str, Any]
    layout: str
    forward: int
    backward: int
    reason: str


MORE = (
    More(
        "reformer", {"correct_duplicates": True}, "", 288, 293,
        "no Triton kernel counts the keys that rounds share: chunks are attended to by torch",
    ),
)  # fmt: skip
TURN = 38, 50
"""What each turn adds where states are recurrent by definition (block_recurrent)."""
LSTM = 8, 24
"""What an LSTM's gate adds to each."""
STATES = 0, 55
"""What states that are many times as many as a turn's tokens add to each: they are gone through in pieces."""
TURNS = 20, 140
"""What all turns add together: views of all of them, a window of states, and gradients of weights."""
GLOBAL = 20, 20
"""What tokens of the model's own add to those that a caller marks, for the whole stack."""
SEGMENT = 30, 30
"""What a segment of memory_tokens adds to the two layers that it runs anew."""
HIERARCHICAL = 100, 200
"""Of a layer within segments and among summaries, at any length, with its share of the model around it."""


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with without_launches():
        yield


def made(name: str, **options: Any) -> zoo.Attention:
    return zoo.build(name, **{"dim": 64, "heads": 4, **options})


def is_refused(layer: zoo.Attention, layout: str) -> bool:
    """Whether the mechanism itself, whatever its kernel, has no meaning for such tokens."""
    if "global" in layout and layer.abilities.global_tokens == "none":
        return True
    return "packed" in layout and getattr(layer, "starts_blank", False)  # only a row's first document can begin so


def most(name: str, options: dict[str, Any], layer: zoo.Attention, layout: str, length: int) -> tuple[int, int]:
    found = [(FORWARD, BACKWARD)]
    if name == "block_recurrent":
        turns = -(-length // layer.window)
        each = [TURN, LSTM if options.get("gate") == "lstm" else (0, 0)]
        each.append(STATES if layer.states > 2 * layer.window else (0, 0))
        # of one turn there is nothing that all turns add together
        along = TURNS if turns > 1 else (0, 0)
        found.append(tuple(found[0][n] + along[n] + turns * sum(part[n] for part in each) for n in (0, 1)))
    for more in MORE:
        if more.name == name and more.layout in layout and more.where.items() <= options.items():
            found.append((more.forward, more.backward))
    forward, backward = map(max, zip(*found))
    return forward, backward


def check(name: str, options: dict[str, Any], length: int = 300, layer: zoo.Attention | None = None) -> None:
    """That no layout takes more, and that none is refused but by the mechanism."""
    layer = made(name, **options) if layer is None else layer
    for what, found in added(layer, length):
        where = f"{name} {options}, {length} tokens, {what}"
        if isinstance(found, zoo.Unsupported):
            assert is_refused(layer, what), f"{where}: {found}"
            continue
        assert not is_refused(layer, what), where
        forward, backward = most(name, options, layer, what, length)
        assert found[0] <= forward, f"{where}: {found[0]} forward, at most {forward}"
        assert found[1] <= backward, f"{where}: {found[1]} backward, at most {backward}"


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_layer_adds_few_operators_to_its_projections(name: str) -> None:
    for options in cases(name):
        check(name, options)


@pytest.mark.parametrize("name", MECHANISMS)
def test_so_does_one_of_few_tokens(name: str) -> None:
    for length in (3, 20):
        for options in ({}, {"positions": "alibi"}, {"sink_logit": True}):
            if options.keys() <= values_of(name).keys() and {*options.values()} <= {True, *abilities()[name].positions}:
                check(name, options, length)


def test_every_option_is_counted_or_said_not_to_be() -> None:
    for name in MECHANISMS:
        values, told = values_of(name), list(cases(name))
        for key, default in options_of(name).items():
            if key in NOT_COUNTED:
                continue
            changed = [options[key] for options in told if key in options and options[key] != default]
            assert all(value in changed for value in values.get(key, [])), f"{name}: {key} is in no case"
            can = abilities()[name]
            assert (
                key in values
                or (key, False) in (("causal", can.two_sided), ("kv_heads", can.grouped_heads))
                or (key == "positions" and len(can.positions) == 1)
            ), f"{name}: {key} has one value"


def test_an_option_that_nobody_has_heard_of_is_in_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    given = options_of("full")
    monkeypatch.setattr("launch_options.options_of", lambda name: {**given, "power": 2})
    with pytest.raises(LookupError, match="option power of full is in no case"):
        values_of("full")


def test_every_call_that_takes_more_is_one_of_the_cases() -> None:
    for more in MORE:
        assert any(more.where.items() <= options.items() for options in cases(more.name)), more


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("options", [{}, {"sink_logit": True, "positions": "rotary"}, {"kv_heads": 2}], ids=str)
def test_heads_that_reach_differently_far_run_as_one(options: dict[str, Any], length: int) -> None:
    """Of few queries, too, which tiles would take one by one, head by head."""
    layer = made("adaptive_span", limit=400, **options)
    with torch.no_grad():
        layer.span.copy_(torch.tensor([3, 40, 100, 250]) / layer.limit)
    check("adaptive_span", options, length, layer)


@pytest.mark.parametrize("name", ["h_transformer_1d", "memory_compressed"])
def test_keys_made_of_tokens_take_no_more_at_any_length(name: str) -> None:
    check(name, {}, 9000)


@pytest.mark.parametrize("options", [{}, {"positions": "alibi"}, {"causal": False, "sink_logit": True}], ids=str)
def test_blocks_take_no_more_at_any_length(options: dict[str, Any]) -> None:
    check("bigbird", options, 3000)


def test_segments_of_memories_run_together() -> None:
    """No more for more segments, whatever their lengths, with the loss that compression learns from."""
    check("compressive", {"segment_length": 64, "memory_length": 64}, 900)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "sink_logit": True}], ids=str)
def test_a_source_takes_few(options: dict[str, Any]) -> None:
    """Cross-attention, of which there are no positions, to sources of every layout."""
    for name in MECHANISMS:
        if not abilities()[name].cross:
            continue
        layer = made(name, cross=True, causal=False, **options)
        for what, given in layouts(2, 200):
            tokens = Layout.plain(2, 200) if given is None else Layout.of(zoo.Tokens.of(*given))
            if "packed" in what or "global" in what:
                continue  # a source is one document
            source = zoo.Source(torch.randn(2, 200, 64), tokens)
            for own, found in added(layer, source=source):
                if isinstance(found, zoo.Unsupported):
                    continue  # nor are its queries of several
                assert found[0] <= FORWARD, f"{name}, {own} to {what}: {found[0]} forward"
                assert found[1] <= BACKWARD, f"{name}, {own} to {what}: {found[1]} backward"


def test_a_turn_of_the_recurrence_takes_a_bounded_number() -> None:
    """Of all documents at once: turns are those of the longest."""
    for what, found in added(made("block_recurrent", window=20, states=8)):
        if "global" not in what:
            turns = 8 if "packed" in what else 15
            assert found[0] <= FORWARD + TURNS[0] + turns * TURN[0], f"{what}: {found[0]} forward"
            assert found[1] <= BACKWARD + TURNS[1] + turns * TURN[1], f"{what}: {found[1]} backward"


def of_a_model(length: int = 300, **options: object) -> dict[str, tuple[int, int]]:
    """Operators of two layers and what stands around them, forward and backward, in each layout that they take."""
    model = zoo.Transformer(**{"vocab": 256, "dim": 64, "depth": 2, "heads": 4, "positions": "none", **options})
    found = {}
    for what, given in layouts(2, length):
        layout = Layout.plain(2, length) if given is None else Layout.of(zoo.Tokens.of(*given))
        ids = torch.randint(0, 256, (2, length))
        try:
            model(ids, layout).logits.sum().backward()
        except zoo.Unsupported:
            continue
        model.zero_grad()
        found[what] = counted(lambda ids=ids, layout=layout: model(ids, layout).logits)
    return found


def test_a_models_own_global_tokens_add_little_to_global_ones() -> None:
    inner = {"name": "longformer"}
    marked = of_a_model(attention=inner)["global"]
    found = of_a_model(attention={"name": "global_tokens", "inner": [inner]})
    assert len(found) >= 5
    for what, (forward, backward) in found.items():
        assert forward <= marked[0] + GLOBAL[0], f"{what}: {forward} forward"
        assert backward <= marked[1] + GLOBAL[1], f"{what}: {backward} backward"


@pytest.mark.parametrize("segments", [1, 3, 6])
def test_a_segment_between_memory_tokens_takes_a_bounded_number(segments: int) -> None:
    alone = of_a_model(attention="full")
    each = [max(count[side] for count in alone.values()) + SEGMENT[side] for side in (0, 1)]
    found = of_a_model(attention={"name": "memory_tokens", "inner": ["full"], "segment_length": 300 // segments})
    assert len(found) >= 4
    for what, (forward, backward) in found.items():
        rounds = segments + 2 * ("packed" in what)  # documents of a row follow one another
        assert forward <= rounds * each[0], f"{what}: {forward} forward"
        assert backward <= rounds * each[1], f"{what}: {backward} backward"


@pytest.mark.parametrize("length", [300, 1500])
def test_a_hierarchical_layer_takes_a_bounded_number(length: int) -> None:
    found = of_a_model(length, attention="hierarchical")
    assert len(found) >= 4
    for what, (forward, backward) in found.items():
        assert forward <= 2 * HIERARCHICAL[0], f"{what}: {forward} forward"
        assert backward <= 2 * HIERARCHICAL[1], f"{what}: {backward} backward"
