"""The learned sink logit: one more score for each head, which takes weight and gives nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Unsupported
from attention_zoo.attention.longformer import Longformer
from attention_zoo.integrations.bare import bare_pattern
from attention_zoo.testing import contract_checks
from attention_zoo.testing.case import close

ASKED = (
    "fast_equals_slow", "any_cut_equals_one_call", "gradients_match_finite_differences",
    "large_scores_of_given_queries_and_keys", "calls_have_the_gradients_of_one_call",
    "the_future_never_changes_the_past",
)  # fmt: skip


class WithSinks(Longformer):
    """Its causal form, with sinks of both kinds."""

    name = "with_sinks"
    tiny = {"window": 3, "sinks": 2}
    declared = replace(Longformer.declared, two_sided=False)


MECHANISMS = ("full", WithSinks, "bigbird", "adaptive_span", "longformer")
AT_ONCE = ((WithSinks, "fast_equals_slow"), *((each, "any_cut_equals_one_call") for each in MECHANISMS[:4]))


@pytest.mark.parametrize(
    ("mechanism", "name"),
    [
        pytest.param(each, name, marks=() if (each, name) in AT_ONCE else pytest.mark.slow)
        for each in MECHANISMS
        for name in ASKED
    ],
)
def test_contract(mechanism: Any, name: str) -> None:
    (check,) = (each for each in contract_checks(mechanism, sink_logit=True) if each.name == name)
    check()


def gpt_oss(q: Any, k: Any, v: Any, mask: Any, sink: Any, scale: float) -> torch.Tensor:
    """Hugging Face's; it has no dtype of its own inside."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], sinks=sink, training=False)
    return eager_attention_forward(module, q, k, v, mask, scale)[0].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("full", {}),
        ("longformer", {"window": 16}),
        ("longformer", {"window": 16, "kernel": "tiles"}),
        ("longformer", {"window": 16, "sinks": 4}),
        ("longformer", {"window": 16, "sinks": 4, "kernel": "tiles"}),
        ("bigbird", {"block": 8}),
    ],
    ids=str,
)
def test_equals_gpt_oss(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Grouped heads, causal; their sliding window of n counts the query, ours does not. b, q, k, v have gradients."""
    layer = zoo.build(backend, dim=32, heads=4, kv_heads=2, sink_logit=True, **options).to(dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.sink.normal_(generator=g)
    q, k, v = (torch.randn(2, h, 90, 8, generator=g, dtype=torch.float64).to(dtype) for h in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)] + [layer.sink]
    tokens = zoo.Tokens.all_valid(2, 90)
    mask = layer.full_bias(tokens, tokens).to(dtype)
    if backend == "longformer":
        gap, key = torch.arange(90)[:, None] - torch.arange(90), torch.arange(90)
        seen = (gap >= 0) & ((gap <= 16) | (key < options.get("sinks", 0)))
        assert torch.equal(mask[0, 0] == 0, seen)
    found, expected = layer.attend(q, k, v), gpt_oss(q, k, v, mask, layer.sink, layer.scale)
    exact = dtype == torch.float64
    close(found, expected, backend, 1e-12 if exact else 2e-6)
    weight = torch.randn(found.shape, generator=g, dtype=torch.float64).to(dtype)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)))
    for mine, theirs in pairs:
        close(mine, theirs, f"{backend}: a gradient", 1e-12 if exact else 1e-5)


def test_it_is_a_factor_by_the_log_sum_exp() -> None:
    layer = zoo.build("full", dim=16, heads=2, sink_logit=True).double()
    plain = zoo.build("full", dim=16, heads=2).double()
    q, k, v = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.sink.copy_(torch.tensor([0.5, -40.0]))
    lse = (q @ k.mT * layer.scale).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).logsumexp(-1)
    factor = (lse - layer.sink[:, None]).sigmoid()[..., None]
    close(layer.attend(q, k, v), plain.attend(q, k, v) * factor, "the output")
    close(layer.attend(q, k, v)[:, 1], plain.attend(q, k, v)[:, 1], "a head whose sink is far below its scores")


@pytest.mark.parametrize("size", [-1e4, -90.0, 90.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_of_any_size_is_finite(dtype: torch.dtype, size: float) -> None:
    """Far above all scores it takes everything, far below nothing; with gradients, in rows large and small."""
    layer = zoo.build("longformer", dim=16, heads=2, window=9, sinks=2, sink_logit=True).to(dtype)
    with torch.no_grad():
        layer.sink.fill_(size)
    x = (torch.randn(1, 50, 16) * torch.tensor([0.01, 1.0, 10.0]).repeat(17)[:50, None]).to(dtype).requires_grad_()
    for kernel in ("banded", "tiles", "dense"):
        layer.kernel = kernel
        out = layer(x).hidden
        grads = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()], allow_unused=True)
        assert all(bool(each.isfinite().all()) for each in (out, *grads) if each is not None), kernel


def test_kernels_that_cannot_say_so() -> None:
    layer = zoo.build("full", dim=16, heads=2, sink_logit=True)
    reasons = dict(layer.explain_kernels(64, torch.device("cpu"), torch.float32))
    assert "it gives no log-sum-exp, by which a learned sink takes its share" in str(reasons["sdpa"])
    assert reasons["tiles"] is None
    for backend, kernel in (("full", "sdpa"), ("longformer", "short"), ("bigbird", "short")):
        layer = zoo.build(backend, dim=16, heads=2, sink_logit=True, kernel=kernel)
        with pytest.raises(Unsupported, match=f"kernel={kernel}"):
            layer(torch.zeros(1, 4, 16))


def test_a_model_of_others_would_not_save_it() -> None:
    with pytest.raises(Unsupported, match="a pattern that learns"):
        bare_pattern("full", {"sink_logit": True}, heads=2, kv_heads=2, head_width=8, causal=True)


def test_without_the_option_nothing_is_saved() -> None:
    assert "sink" not in zoo.build("full", dim=16, heads=2).state_dict()
    assert zoo.build("full", dim=16, heads=2, sink_logit=True).state_dict()["sink"].tolist() == [0, 0]
