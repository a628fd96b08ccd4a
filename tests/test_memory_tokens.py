"""Memory tokens: what is read and written, how far gradients go, rows at different phases of their segments."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from references.memory_tokens import reference
from small_models import VOCAB, entry, far, in_pieces, packed, ragged, some_ids
from torch import Tensor
from turns import assert_within, flops_of

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer, Unsupported
from attention_zoo.attention.full import Full
from attention_zoo.jobs.compare import register
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.segments import pieces
from attention_zoo.measure.flops import count_pairs
from attention_zoo.model import detach
from attention_zoo.testing import contract_checks
from attention_zoo.testing.case import Case, feed, gradients

S, M = 8, 4


def layer(**options: Any) -> Any:
    return Case.of("memory_tokens").build(**{"causal": True, **options})


def model(inner: Any = "full", causal: bool = True, **options: Any) -> Transformer:
    torch.manual_seed(7)
    wrapper = {"name": "memory_tokens", "count": 3, "segment_length": 5, **options, "inner": inner}
    head = "lm" if causal else "hidden"
    made = Transformer(attention=wrapper, vocab=VOCAB, dim=16, heads=2, causal=causal, head=head)
    return made.double().eval()


def some(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)


class Watched(Full):
    """Full attention that notes what it is given."""

    def forward(self, x: Tensor, tokens: Any = None, **rest: Any) -> Any:
        self.__dict__.setdefault("given", []).append((x, tokens, rest.get("state")))
        return super().forward(x, tokens, **rest)


def watched(**options: Any) -> Any:
    torch.manual_seed(1)
    inner = Watched(dim=16, heads=2, causal=options.get("causal", True))
    return zoo.build("memory_tokens", dim=16, heads=2, count=2, segment_length=3, **{**options, "inner": inner})


# --- what is read and written -----------------------------------------------------------------------------------------


def test_a_segment_stands_between_what_it_reads_and_what_it_writes() -> None:
    wrapper, x = watched(), torch.randn(1, 8, 16)
    wrapper(x)
    given = wrapper.inner.given
    assert [seen.shape[1] for seen, _, _ in given] == [2 + 3 + 2, 2 + 3 + 2, 2 + 2]  # nobody reads what the last wrote
    memory = wrapper.memory[None]
    assert torch.equal(given[0][0], torch.cat([memory, x[:, :3], memory], 1))
    written = Full.forward(wrapper.inner, given[0][0]).hidden[:, -2:]
    memory = torch.nn.functional.layer_norm(written, (16,))
    assert far(given[1][0], torch.cat([memory, x[:, 3:6], memory], 1)) < 1e-6
    assert given[0][1] is given[1][1]  # planned once


@pytest.mark.parametrize("causal", [True, False])
def test_memory_in_front_alone(causal: bool) -> None:
    """An encoder's form; a causal one writes before it has read, whatever stands in the segment."""
    wrapper, x = watched(write="front", causal=causal), torch.randn(1, 8, 16)
    wrapper(x)
    first, second = (seen for seen, _, _ in wrapper.inner.given[:2])
    assert first.shape[1] == 2 + 3
    other = x.clone()
    other[:, :3] += 1
    wrapper.inner.given.clear()
    wrapper(other)
    assert torch.equal(wrapper.inner.given[1][0][:, :2], second[:, :2]) == causal


def test_auto_is_the_papers_form_of_either_side() -> None:
    assert layer().at_end
    assert not layer(causal=False).at_end
    with pytest.raises(Unsupported, match="memory_tokens: write=end with causal=False is not supported"):
        layer(causal=False, write="end")


def test_one_segment_is_what_stands_inside_with_memory_in_front() -> None:
    wrapper, x = layer(), some(2, S)
    inside = wrapper.inner(torch.cat([wrapper.memory.expand(2, -1, -1), x], 1)).hidden[:, M:]
    assert far(wrapper(x).hidden, inside) < 1e-12


def test_what_was_far_away_comes_through_memory_alone() -> None:
    wrapper, x = layer(), some(1, 3 * S)
    other = x.clone()
    other[:, 2] += 1
    assert far(wrapper(other).hidden[:, -1], wrapper(x).hidden[:, -1]) > 1e-6
    cut = layer(write="front")
    assert far(cut(other).hidden[:, -1], cut(x).hidden[:, -1]) == 0.0


# --- how far gradients go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [0, 1, 2, 3, None])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_the_last_segment_go_back_so_many_and_no_further(truncate: int | None, causal: bool) -> None:
    count = 5
    wrapper, x = layer(truncate=truncate, causal=causal), some(2, count * S).requires_grad_()
    out = wrapper(x).hidden
    to_x, to_memory = torch.autograd.grad(out[:, -S:].square().sum(), [x, wrapper.memory], allow_unused=True)
    reached = [bool(part.any()) for part in to_x.split(S, 1)]
    back = count - 1 if truncate is None else truncate
    assert reached == [number >= count - 1 - back for number in range(count)]
    assert (to_memory is not None and bool(to_memory.any())) == (truncate is None)
    assert far(out, layer(causal=causal)(x).hidden) == 0.0  # values are the same


@pytest.mark.parametrize("truncate", [0, 1, 2])
def test_no_segments_gradients_go_further(truncate: int) -> None:
    wrapper, x = layer(truncate=truncate), some(1, 5 * S).requires_grad_()
    for number, part in enumerate(wrapper(x).hidden.split(S, 1)):
        (grad,) = torch.autograd.grad(part.square().sum(), x, retain_graph=True)
        assert not bool(grad[:, : max(0, number - truncate) * S].any())


def test_truncation_counts_in_each_document_and_row() -> None:
    wrapper = layer(truncate=1)
    valid = ragged(60, [60, 45, 21], "left")
    document = torch.arange(60)[None] // torch.tensor([[27], [60], [45]])
    tokens, x = Tokens.of(valid, document=document), some(3, 60).requires_grad_()
    found = gradients(wrapper, x, wrapper(x, tokens).hidden, valid)
    expected = gradients(wrapper, x, reference(wrapper, x, tokens), valid)
    assert all(far(found[name], expected[name]) < 1e-11 for name in expected)


@pytest.mark.parametrize("truncate", [0, 2, None])
def test_gradients_cross_calls_unless_they_are_truncated(truncate: int | None) -> None:
    wrapper, x = layer(truncate=truncate), some(2, 3 * S).requires_grad_()
    hidden, _ = feed(wrapper, x, Tokens.all_valid(2, 3 * S), [S + 3])
    (grad,) = torch.autograd.grad(hidden[:, -2:].square().sum(), x)
    assert bool(grad[:, : S + 3].any()) == (truncate is None)
    assert bool(grad[:, S + 3 :].any())


def test_untruncated_calls_have_the_gradients_of_one_at_any_cut() -> None:
    wrapper, x = layer(), some(2, 21).requires_grad_()
    tokens = Tokens.all_valid(2, 21)
    expected = gradients(wrapper, x, wrapper(x, tokens).hidden, tokens.valid)
    for cut in range(1, 21):
        found = gradients(wrapper, x, feed(wrapper, x, tokens, [cut])[0], tokens.valid)
        assert all(far(found[name], expected[name]) < 1e-11 for name in expected), cut


# --- whatever stands inside, rows at any phase ------------------------------------------------------------------------

INSIDE: list[Any] = [
    "full", entry("longformer"), entry("transformer_xl"), [entry("full", positions="rotary"), entry("bigbird")],
    {"name": "global_tokens", "count": 2, "inner": entry("longformer")},
    {"name": "memory_tokens", "count": 2, "segment_length": 3, "inner": "full"},
]  # fmt: skip


@pytest.mark.parametrize("inner", INSIDE, ids=lambda inner: str(inner)[:24])
@pytest.mark.parametrize("write", ["end", "front"])
def test_every_cut_equals_the_whole(inner: Any, write: str) -> None:
    made, ids = model(inner, write=write), some_ids()
    tokens = packed(torch.stack([*ragged(23, [18], "left"), *ragged(23, [19], "right"), torch.ones(23) > 0]), 6, 14)
    with torch.no_grad():
        whole = made(ids, tokens).logits
        for cuts in [*([cut] for cut in range(1, 23, 1 if inner == "full" else 6)), list(range(1, 23, 2))]:
            assert far(in_pieces(made, ids, tokens, cuts)[tokens.valid], whole[tokens.valid]) < 1e-10, cuts


def test_lsh_inside_replays_its_choices() -> None:
    wrapper = zoo.build("memory_tokens", dim=16, heads=2, count=2, segment_length=6, inner=entry("reformer"))
    x = torch.randn(2, 20, 16)
    out = wrapper(x)
    assert len(out.choices) == 4
    assert torch.equal(wrapper(x, choices=out.choices).hidden, out.hidden)
    assert wrapper.abilities.carry == "prefix"


def test_the_state_stays_as_large_and_may_be_cut() -> None:
    made = model()
    state, sizes = made.initial_state(1), set()
    with torch.no_grad():
        for _ in range(12):
            state = made(some_ids(1, 10), state=state).state
            sizes.add(zoo.model.state_bytes(state.layers.own.vectors))
    assert sizes == {3 * 16 * 8}
    assert len(detach(copy.deepcopy(state)).layers.own.vectors) == 1


def test_abilities_are_those_of_bounded_segments() -> None:
    can = layer().abilities
    assert (can.compute, can.activations, can.state, can.global_tokens) == ("linear", "linear", "constant", "none")
    assert (can.causality, can.carry, can.two_sided) == ("strict", "prefix", True)


@pytest.mark.parametrize(("options", "match"), [
    ({"count": 0}, "count must be an integer of at least 1, got 0"),
    ({"segment_length": 0}, "segment_length must be an integer of at least 1, got 0"),
    ({"truncate": -1}, "truncate must be"),
    ({"write": "back"}, "write must be one of auto, end, front"),
])  # fmt: skip
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        zoo.build("memory_tokens", dim=16, heads=2, **options)


def test_what_cannot_be_is_refused() -> None:
    shape = {"vocab": 9, "dim": 16, "heads": 2}
    with pytest.raises(Unsupported, match="memory_tokens: cross-attention inside is not supported"):
        Transformer(attention="memory_tokens", cross=True, **shape)
    with pytest.raises(Unsupported, match="memory_tokens: reversible=both is not supported"):
        Transformer(attention="memory_tokens", reversible="both", **shape)
    made, ids = model("longformer"), some_ids()
    flags = torch.zeros_like(ids, dtype=torch.bool)
    flags[:, 0] = True
    with pytest.raises(Unsupported, match="memory_tokens: global tokens is not supported"):
        made(ids, Tokens.of(torch.ones_like(flags), flags))
    state = model(count=2).initial_state(3)
    with pytest.raises(ValueError, match=r"state must hold memory of shape \(3, 3, 16\) like this layer"):
        made(ids, state=state)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_of_segments_with_their_memory(causal: bool) -> None:
    made = layer(causal=causal)
    for length in (1, S, S + 1, 2 * S, 21):
        # nobody reads what the last would write
        columns = [M + min(S, length - at) + M * (causal and at + S < length) for at in range(0, length, S)]
        assert count_pairs(made, length) == sum(n * (n + 1) // 2 if causal else n * n for n in columns)
        assert count_pairs(made, length, last_row_only=True) == columns[-1]
    assert count_pairs(zoo.build("global_tokens", dim=16, heads=2), length) is None, "a wrapper that does not say"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("inner", ["full", "longformer"])
def test_time_is_that_of_the_segments_and_of_what_memory_adds(inner: str) -> None:
    """At 16,384 tokens, 8 heads x 64, forward and backward: within 1.25 times what the mechanism inside takes for every
    segment by itself, raised by as many FLOPs as memory adds. Seconds of the processor, in turns, on until it holds.
    """
    wrapper = zoo.build("memory_tokens", dim=512, heads=8, inner=inner).train()
    x = torch.randn(1, 16384, 512).requires_grad_()
    size = wrapper.segment_length
    with torch.no_grad():
        added = flops_of(wrapper, x) / flops_of(wrapper.inner, x[:, :size], x.shape[1] // size)
    assert 1.05 < added < 1.15

    def alone() -> None:
        torch.cat([wrapper.inner(part).hidden for part in x.split(size, 1)], 1).sum().backward()

    def wrapped() -> None:
        wrapper(x).hidden.sum().backward()

    assert_within(1.25 * added, wrapped, alone)


def test_its_preset_reads_words_in_segments_and_writes_at_either_end() -> None:
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        runs = OmegaConf.to_object(compose("compare", ["output=unused", "preset=memory"])).runs()  # type: ignore[union-attr]
    of = {run.name: run.config for run in runs}
    assert len(of) == 9
    for name, segments in {"reverse": 2, "copy": 3}.items():
        for backend, write in {"memory_tokens": "auto", "memory_in_front": "front"}.items():
            config = of[f"{name}-{backend}-s0"]
            made = config["attention"]
            assert made.get("write", "auto") == write
            assert made["segment_length"] == made["count"] == config["task"]["tokens"]
            assert config["seq_len"] == segments * made["segment_length"]


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_pieces_are_counted_in_documents() -> None:
    valid = torch.tensor([[True, True, True, True, True, True, True], [False, True, False, True, True, False, False]])
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2, 2]])
    found = pieces(Layout.of(Tokens.of(valid, document=document)).host, 2)
    assert found.width.tolist() == [2, 1, 2, 2]
    assert found.exists.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.segment[0].tolist() == [0, 1, 0, 1]
    assert found.left.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert found.completes[0].tolist() == [True, False, True, True]
    x = torch.randn(2, 7, 3)
    back = found.joined(list(found.split(x)))
    assert torch.equal(back, x * valid[..., None])


def test_columns_stay_where_they_are_if_nothing_is_missing() -> None:
    found = pieces(Layout.plain(2, 11).host, 4)
    assert found.in_order
    assert found.width.tolist() == [4, 4, 3]
    assert not pieces(Layout.plain(2, 11).host.only(np.arange(11)[None] != 3), 4).in_order


def test_in_front_half_precision_loses_as_the_loop_does() -> None:
    """A causal memory in front goes through the same layer again and again, without a text that would renew it: what
    is rounded grows from segment to segment, in the definition as here. The first loses no more than dense attention.
    """

    def lost(found: Tensor, exact: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    case, length = Case.of("memory_tokens", write="front"), 12 * S
    low, dense = (each.build(causal=True).bfloat16() for each in (case, Case.of("full", kernel="dense")))
    x, tokens = case.data(3, length, dtype=torch.bfloat16), Tokens.all_valid(3, length)
    with torch.no_grad():
        exact, shallow = (copy.deepcopy(each).double()(x.double()).hidden for each in (low, dense))
        found = low(x).hidden
        assert lost(found[:, :S], exact[:, :S]) <= 2 * lost(dense(x).hidden, shallow)
        assert lost(found, exact) <= 1.2 * lost(reference(low, x, tokens), exact)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"write": "front"}, "bfloat16_loses_no_more_than_dense"),  # but see above
        ({"inner": entry("longformer", global_projections="shared")}, None),
    ],
    ids=str,
)
def test_the_contract_under_other_options(options: dict[str, Any], left_out: str | None) -> None:
    for check in contract_checks("memory_tokens", reference=reference, **options):
        if not check.slow and check.name != left_out:
            check()
