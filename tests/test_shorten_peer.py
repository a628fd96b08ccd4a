"""Shortened stacks against hourglass-transformer-pytorch on the same weights: outputs and gradients.

Without its attention between levels, which has a feed-forward layer of its own and attends within a group. Lengths are
multiples of the factors: at others it fails, since its padding uses a module that it does not import.
"""

from __future__ import annotations

import pytest
import torch
from hourglass_transformer_pytorch import hourglass_transformer_pytorch as peer
from small_models import far

from attention_zoo import Transformer, Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.hourglass_transformer import LIKE, HourglassTransformer, copy, mirrored, stack_pairs

OURS = {"mean": "naive", "linear": "linear"}
CASES = [
    ("1@1 2@3 1@1", (1, 2, 1), (3,), 24),
    ("2@1 1@2 2@4 1@2 1@1", (2, (1, 2, 1), 1), (2, 2), 32),
    ("1@1 1@4 1@12 1@4 2@1", (1, (1, 1, 1), 2), (4, 3), 36),
]


def ours(layout="1@1 2@3 1@1", kind="linear", **options):
    up = "repeat" if kind == "mean" else "linear"
    shorten = {"name": "hourglass", "layout": layout, "pool": kind, "up": up}
    return Transformer(**{**LIKE, "vocab": 5, "dim": 16, "heads": 2, "shorten": shorten, **options})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("layout", "depth", "factors", "length"), CASES)
def test_equals_the_port(layout, depth, factors, length, kind, causal):
    torch.manual_seed(0)
    model = ours(layout, kind, causal=causal).double()
    assert {"depth": depth, "shorten_factor": factors, "causal": causal}.items() <= mirrored(model).items()
    theirs = peer.get_hourglass_transformer(
        16, depth=depth, shorten_factor=factors, attn_resampling=False, updown_sample_type=OURS[kind], heads=2,
        dim_head=8, causal=causal, norm_out=True,
    ).double()  # fmt: skip
    pairs = stack_pairs(theirs, model)
    copy(pairs)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    expected, found = theirs(x), model.norm(model.stack(x).hidden)
    assert far(found, expected) < 1e-12
    gradients = []
    for side, out in enumerate((expected, found)):
        leaves = [leaf for pair in pairs for leaf in pair[side]]
        grads = iter(torch.autograd.grad((out * weight).sum(), [x, *leaves]))
        gradients.append([next(grads), *(torch.cat([next(grads) for _ in pair[side]]) for pair in pairs)])
    for other, one in zip(*gradients):
        assert far(one, other) < 1e-10 * max(1, float(other.abs().max()))


def test_the_pairs_are_all_parameters():
    model = ours()
    shape = Shape(1, 20, torch.device("cpu"), torch.float32)
    made = HourglassTransformer(model, shape)
    assert made.length == 21
    count = sum(p.numel() for p in made.released.parameters())
    assert count == model.parameter_count
    assert made.released(torch.randint(5, (1, 21))).shape == (1, 21, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"shorten": None},
        {"shorten": {"name": "hourglass", "layout": "1@1 2@3 1@1", "up": "attention"}},
        {"shorten": {"name": "hourglass", "layout": "1@1 2@3 1@1", "pool": "mean"}},
        {"shorten": {"name": "funnel", "layout": "1@1 2@3 1@1"}, "causal": False},
        {"attention": "full"},
        {"attention": ["full", "longformer"]},
        {"positions": "rotary"},
        {"pre_norm": False},
        {"norm": "rms"},
        {"tied": True, "head": "lm"},
        {"feed_forward": "swiglu"},
        {"short_conv": 3},
    ],
)
def test_what_it_cannot_mirror_is_refused(options):
    with pytest.raises(Unsupported, match=r"hourglass-transformer-pytorch: .* use .* instead"):
        mirrored(ours(**options))
