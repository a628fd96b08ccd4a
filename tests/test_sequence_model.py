"""One sequence in several processes: models equal what they are in one, or say that they cannot, by name.

Processes are started once for each number of them; all cases run inside (tests/sequence_models.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from attention_zoo import registry
from attention_zoo.model.block import attentions
from attention_zoo.model.level import Level
from attention_zoo.model.transformer import Transformer
from tests.processes import together
from tests.sequence_models import PADDINGS, SHARED, Found, batch_of

TINY = {name: {"name": name, **registry.recipe(name)[0].tiny} for name in (*registry.available(), *registry.wrappers())}
XL = {"name": "transformer_xl", "segment_length": 4, "memory_length": 5}
COMPRESSIVE = TINY["compressive"]
RECURRENT = {"name": "block_recurrent", "window": 4, "states": 3}

MODELS: Mapping[str, dict[str, Any]] = {
    **{name: {"attention": options} for name, options in TINY.items()},
    "transformer_xl, same length": {"attention": XL | {"same_length": True}},
    "transformer_xl, long memory": {"attention": XL | {"memory_length": 17}},
    "transformer_xl, zeros": {"attention": XL | {"initial_memory": "zeros"}},
    "transformer_xl, untied, post-norm": {"attention": XL | {"untie_r": True}, "pre_norm": False},
    **{f"compressive, {how}": {"attention": COMPRESSIVE | {"compression": how}} for how in ("mean", "dilated")},
    "compressive, most used": {"attention": COMPRESSIVE | {"compression": "most_used", "segment_length": 6}},
    "compressive, nothing compressed": {"attention": COMPRESSIVE | {"compressed_length": 0}},
    "block_recurrent, rotary": {"attention": RECURRENT | {"positions": "rotary"}},
    "block_recurrent, cut off": {"attention": RECURRENT | {"gate": "lstm", "truncate": 2}},
    "memory_tokens, front": {"attention": TINY["memory_tokens"] | {"write": "front", "inner": "longformer"}},
    "short convolution": {"attention": XL, "short_conv": 3},
    "gated convolution": {"attention": RECURRENT, "short_conv": {"name": "gated", "width": 4}},
    "reversible": {"attention": [XL, RECURRENT], "reversible": True},
    "hourglass": {"attention": "full", "depth": 3, "shorten": "1@1 1@2 1@1"},
    "hourglass, attention between": {
        "attention": "full", "depth": 3, "shorten": {"name": "hourglass", "layout": "1@1 1@3 1@1", "up": "attention"},
    },
    "hourglass of rings and windows": {
        "attention": ["full", "longformer", XL], "depth": 5, "shorten": "1@1 1@2 1@6 1@2 1@1",
    },
    "token losses in a shorter level": {
        "attention": ["full", COMPRESSIVE, "longformer"], "depth": 3, "shorten": "1@1 1@3 1@1",
    },
    "token losses in all levels": {"attention": COMPRESSIVE, "depth": 5, "shorten": "1@1 1@2 1@4 1@2 1@1"},
    "learned positions": {"attention": RECURRENT, "positions": "learned"},
    "options": {"attention": XL, "norm": "rms", "feed_forward": {"name": "swiglu", "chunks": 2}, "tied": False},
}  # fmt: skip
"""Causal ones."""

SEVERAL_DOCUMENTS = {"transformer_xl, zeros": "several documents in a row"}
"""Refused in one process, too."""

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "reformer": ({"attention": TINY["reformer"]}, "hashes are sorted"),
    "memory_tokens, truncated": ({"attention": TINY["memory_tokens"] | {"truncate": 1}}, "gradients end with a call"),
    "memory_tokens around transformer_xl": (
        {"attention": TINY["memory_tokens"] | {"inner": XL}}, "gradients end with a call",
    ),
    "global tokens around a reversible stack": (
        {"attention": TINY["global_tokens"] | {"inner": "full"}, "reversible": True}, "a reversible stack inside",
    ),
    "global tokens in the first call alone": (
        {"attention": TINY["global_tokens"] | {"inner": "longformer"}}, "only its first call may bring some",
    ),
    "two-sided memory_tokens": ({"attention": TINY["memory_tokens"], "causal": False}, "two-sided"),
    "two-sided hourglass": ({"attention": "full", "depth": 3, "shorten": "1@1 1@2 1@1", "causal": False}, "two-sided"),
    "pooled": (
        {"attention": "longformer", "causal": False, "head": "classify", "classes": 2}, "all columns of the row",
    ),
}  # fmt: skip

FAST = [(name, padding, length) for name in MODELS for padding, length in (("none", 13), ("documents", 29))]
"""The one or the other in the fast tests."""
TOKEN_LOSSES = [
    (name, padding, length)
    for name in MODELS
    if "token losses" in name
    for padding, length in (("left", 53), ("right", 41))
]
"""Long enough for something to be compressed in the shortest level."""
LENGTHS = {"none": (1, 24), "right": (2, 31), "left": (3, 17), "documents": (5, 31)}
SLOW = [(name, padding, length) for name in MODELS for padding in PADDINGS for length in LENGTHS[padding]]
Case = tuple[str, str, int]


@pytest.fixture(scope="module")
def two() -> tuple[dict[Case, Found], dict[str, Found]]:
    """Two processes: models that run, and those that do not."""
    cases, refusals = (
        [*FAST[1::2], *TOKEN_LOSSES],
        [(options, "documents", 29, "float64") for options, _ in REFUSED.values()],
    )
    found, refused = ran(2, cases, refusals)
    return found, dict(zip(REFUSED, refused, strict=True))


def ran(
    size: int, cases: list[Case], further: Sequence[tuple[dict[str, Any], str, int, str]] = (), dtype: str = "float64"
) -> tuple[dict[Case, Found], list[Found]]:
    """By case, and what came of further ones; what one process refuses is left out."""
    cases = [case for case in cases if not (case[1] == "documents" and case[0] in SEVERAL_DOCUMENTS)]
    given = [(MODELS[name], padding, length, dtype) for name, padding, length in cases]
    found = [Found(*each) for each in together(size, "tests.sequence_models:all_compared", [*given, *further])]
    return dict(zip(cases, found)), found[len(cases) :]


def check_equal(found: dict[Case, Found], most: float) -> None:
    wrong = {case: each for case, each in found.items() if each.error is not None and not each.error <= most}
    assert not wrong, wrong
    refused = {name: each.refused for (name, *_), each in found.items() if each.error is None}
    assert set(refused) <= {"reformer"}, refused


def test_models_equal_one_process(two: tuple[dict[Case, Found], dict[str, Found]]) -> None:
    check_equal(two[0], 1e-12)


def test_models_of_three_processes_equal_one() -> None:
    check_equal(ran(3, [*FAST[::6], *TOKEN_LOSSES])[0], 1e-12)


@pytest.mark.parametrize(("name", "padding", "length"), TOKEN_LOSSES)
def test_there_are_token_losses_to_compare(name: str, padding: str, length: int) -> None:
    """Of all levels, the shorter ones among them: else their equality would say nothing."""
    torch.manual_seed(0)
    model, batch = Transformer(**SHARED | MODELS[name]).double(), batch_of(padding, length)
    shorter = [each for level in model.modules() if isinstance(level, Level) for each in attentions(level.inside)]
    found: list[dict[str, torch.Tensor]] = []
    for each in shorter:
        each.register_forward_hook(lambda _layer, _given, output: found.append(output.losses))
    total = float(model(batch.ids, batch.tokens).losses["reconstruction"].detach())
    inside = [float(each["reconstruction"].detach()) for each in found if "reconstruction" in each]
    assert total > 1e-6
    assert min(inside) > 1e-6


def test_what_has_no_way_is_refused_by_name(two: tuple[dict[Case, Found], dict[str, Found]]) -> None:
    for name, (error, refused, *_) in two[1].items():
        assert error is None, name
        assert REFUSED[name][1] in str(refused), name
        assert "; use " in str(refused), name


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.long))])
def test_layers_are_blind_to_padding_and_future(size: int) -> None:
    names = [name for name in TINY if name != "reformer"]
    for name, (whole, padding, future) in together(size, "tests.sequence_models:layers", names).items():
        assert whole <= 1e-12, name
        assert padding == 0, name
        assert future == 0, name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_models_equal_one_process_at_all_lengths(size: int) -> None:
    check_equal(ran(size, SLOW)[0], 1e-12)


@pytest.mark.slow
@pytest.mark.long
def test_models_equal_one_process_in_float32() -> None:
    check_equal(ran(3, FAST, dtype="float32")[0], 1e-5)
