"""Shortened stacks against hourglass-transformer-pytorch on the same weights: outputs and gradients.

Without its attention between levels, which has a feed-forward layer of its own and attends within a group. Lengths are
multiples of the factors: at others it fails, since its padding uses a module that it does not import.
"""

from __future__ import annotations

import pytest
import torch
from hourglass_transformer_pytorch import hourglass_transformer_pytorch as peer
from small_models import far

from attention_zoo import Transformer

OURS = {"mean": "naive", "linear": "linear"}
CASES = [
    ("1@1 2@3 1@1", (1, 2, 1), 3, 24),
    ("2@1 1@2 2@4 1@2 1@1", (2, (1, 2, 1), 1), (2, 2), 32),
    ("1@1 1@4 1@12 1@4 2@1", (1, (1, 1, 1), 2), (4, 3), 36),
]


def copied(theirs, model):
    """Their weights in ours, and pairs of parameters."""
    pairs = []

    def linear(a, b):
        pairs.append((a.weight, b.weight))
        if a.bias is not None:
            pairs.append((a.bias, b.bias))

    def stack(one, other):
        for (attention, ff), block in zip(one.layers, other.layers, strict=True):
            for layer, branch in zip((attention, ff), block.layers, strict=True):
                linear(layer.norm, branch.norm)
            ours, width = block.attention, attention.fn.to_q.weight.shape[0]
            into = torch.cat([attention.fn.to_q.weight, attention.fn.to_kv.weight])
            for name, part in zip(("to_q", "to_k", "to_v"), into.split(width)):
                getattr(ours, name).weight.data.copy_(part)
            pairs.append((attention.fn.to_q.weight, ours.to_q.weight))
            linear(attention.fn.to_out, ours.to_out)
            feed = [each for each in block.layers[1].body.modules() if isinstance(each, torch.nn.Linear)]
            for a, b in zip((ff.fn[0], ff.fn[3]), feed, strict=True):
                linear(a, b)

    def level(one, other):
        if not hasattr(one, "valley_transformer"):
            stack(one, other)
            return
        stack(one.pre_transformer, other.before)
        level(one.valley_transformer, other.inside)
        stack(one.post_transformer, other.after)
        for a, b in ((one.downsample, other.pool.linear), (one.upsample, other.up.linear)):
            if b is not None:
                linear(a.proj, b)

    level(theirs, model.stack)
    linear(theirs.norm_out, model.norm)
    for a, b in pairs:
        b.data.copy_(a.data)
    return pairs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("layout", "depth", "factors", "length"), CASES)
def test_equals_the_port(layout, depth, factors, length, kind, causal):
    torch.manual_seed(0)
    up = "repeat" if kind == "mean" else "linear"
    model = Transformer(
        attention={"name": "full", "bias": "out"},
        vocab=5,
        dim=16,
        heads=2,
        causal=causal,
        head="hidden",
        positions="none",
        shorten={"name": "hourglass", "layout": layout, "pool": kind, "up": up},
    ).double()
    theirs = peer.get_hourglass_transformer(
        16, depth=depth, shorten_factor=factors, attn_resampling=False, updown_sample_type=OURS[kind], heads=2,
        dim_head=8, causal=causal, norm_out=True,
    ).double()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    pairs = copied(theirs, model)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    expected, found = theirs(x), model.norm(model.stack(x).hidden)
    assert far(found, expected) < 1e-12
    ours = torch.autograd.grad((found * weight).sum(), [x, *(b for _, b in pairs)])
    for one, other in zip(ours, torch.autograd.grad((expected * weight).sum(), [x, *(a for a, _ in pairs)])):
        assert far(one, other) < 1e-10 * max(1, float(other.abs().max()))
