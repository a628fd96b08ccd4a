"""Sinks: the first tokens of a document stay in sight of a window, at constant memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Unsupported
from attention_zoo.attention.longformer import Longformer
from attention_zoo.model.state import state_bytes
from attention_zoo.testing import contract_checks

ASKED = (
    "reach_hides_nothing", "weights_are_what_reach_says", "fast_equals_slow", "the_future_never_changes_the_past",
    "padding_contents_never_matter", "documents_in_one_row_equal_documents_apart", "any_cut_equals_one_call",
    "ragged_prompts_decode_like_rows_alone", "large_scores_are_finite_and_right", "bfloat16_loses_no_more_than_dense",
)  # fmt: skip


class Streaming(Longformer):
    """Its causal form, with sinks."""

    name = "streaming"
    tiny = {"window": 3, "sinks": 2}
    declared = replace(Longformer.declared, two_sided=False)


@pytest.mark.parametrize("name", ASKED)
def test_contract(name: str) -> None:
    (check,) = (each for each in contract_checks(Streaming) if each.name == name)
    check()


def test_the_definition_is_a_window_and_the_first_tokens() -> None:
    layer = zoo.build("longformer", dim=8, heads=2, causal=True, window=3, sinks=2).double()
    x = torch.randn(1, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (layer._heads(project(x)) for project in (layer.to_q, layer.to_k, layer.to_v))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (j <= i) & ((i - j <= 3) | (j < 2))
    expected = ((q @ k.transpose(2, 3)) * layer.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert (layer.attend(q, k, v) - expected).abs().max() < 1e-12


def test_a_stream_keeps_the_sinks_and_no_more_than_a_window() -> None:
    layer = zoo.build("longformer", dim=8, heads=2, causal=True, window=4, sinks=2).eval()
    x = torch.randn(1, 600, 8, generator=torch.Generator().manual_seed(1))
    whole, state, sizes, said = layer(x).hidden, layer.initial_state(1), [], []
    with torch.no_grad():
        for column in range(600):
            tokens = zoo.Tokens.of(torch.ones(1, 1, dtype=torch.bool), start=torch.tensor([column]))
            out = layer(x[:, column : column + 1], tokens, state=state)
            state = out.state
            said.append(out.hidden)
            sizes.append(state_bytes(state))
    assert (torch.cat(said, 1) - whole).abs().max() < 1e-5
    assert max(sizes[300:]) <= max(sizes[:300])


def test_two_sided_attention_has_none() -> None:
    with pytest.raises(Unsupported, match="longformer: sinks=4 with causal=False is not supported"):
        zoo.build("longformer", dim=8, heads=2, causal=False, sinks=4)
