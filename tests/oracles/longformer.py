"""Longformer against Hugging Face's (window, global tokens, dilation) and against local-attention (causal window).

Hugging Face computes the softmax in float32 whatever the dtype, so that float64 ends at 1e-7 there. The same module
with only that one cast taken away is a second oracle, which goes as far as float64 does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens

from .case import (
    FLOAT64,
    USUAL,
    Bounds,
    Case,
    Errors,
    Leaves,
    at_columns,
    compare,
    padding,
    randomise,
    vectors,
)

EXACT = Bounds({torch.float64: FLOAT64}, "In float32 the cast changes nothing: that is the row above.")
AS_RELEASED = Bounds(
    {torch.float32: Errors(2e-6, 2e-6), torch.float64: Errors(4e-7, 1e-6)},
    "In float32 ours is up to 7.3e-7 from its own float64, theirs 1.0e-6, and which way depends on the CPU. "
    "Theirs computes the softmax in float32 whatever the dtype: in float64, too, each of its weights is off by half a "
    "last place of float32, 2.5e-7 in their sum.",
)
KERNELS = ("auto", "banded", "tiles", "dense")


def softmax_in_own_dtype() -> AbstractContextManager[Any]:
    """torch's softmax without the cast that callers ask for."""
    own = nn.functional.softmax
    return mock.patch.object(nn.functional, "softmax", lambda x, dim, dtype=None: own(x, dim=dim))


def hugging_face(leaves: Leaves, x: Tensor, valid: Tensor, is_global: Tensor, heads: int, window: int) -> Tensor:
    """LongformerSelfAttention, of any length: filled up with padding to whole windows, as their model does."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    L, E = x.shape[1:]
    config = LongformerConfig(
        hidden_size=E,
        num_attention_heads=heads,
        attention_window=[2 * window],  # theirs is the whole window
        attention_probs_dropout_prob=0.0,
    )
    theirs = LongformerSelfAttention(config, 0).to(x.dtype)
    weights = {}
    for mine, other in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        for kind in ("weight", "bias"):
            weights[f"{other}.{kind}"] = leaves[f"{mine}.{kind}"]
            weights[f"{other}_global.{kind}"] = leaves[f"{mine}_global.{kind}"]
    more = -L % (2 * window)
    x = nn.functional.pad(x, (0, 0, 0, more))
    valid, is_global = (nn.functional.pad(flags, (0, more)) for flags in (valid, is_global))
    mask = torch.where(valid, torch.where(is_global, 10_000.0, 0.0), -10_000.0).to(x.dtype)
    call = (x, mask, ~valid, is_global, bool(is_global.any()))
    return torch.func.functional_call(theirs, weights, call)[0][:, :L]


def project_out(leaves: Leaves, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, leaves["to_out.weight"], leaves["to_out.bias"])


def run_global(seed: int, kernel: str, double_inside: bool, dtype: torch.dtype) -> Errors:
    """Random window, length, padding and global tokens."""
    rng = random.Random(seed)
    heads, width, window = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(2, 6)  # theirs fails at 1
    batch, length = rng.randint(1, 3), rng.randint(2, 70)
    kind = rng.choice(["none", "right", "left", "holes"])
    valid = padding(rng, batch, length, kind)
    is_global = torch.zeros_like(valid)
    counts = [rng.choice([0, 0, 1, 2, 4]) for _ in range(batch)]
    if dtype == torch.float64 and not double_inside:
        # cast to float32 their mask overflows: a row that sees nothing else, or has fewer global tokens, becomes NaN
        counts = [min(rng.randint(1, 4), int(valid.sum(1).min()))] * batch
    for row, good, count in zip(is_global, valid, counts):
        row[rng.sample(good.nonzero().flatten().tolist(), min(int(good.sum()), count))] = True
    layer = zoo.build("longformer", dim=heads * width, heads=heads, causal=False, window=window, kernel=kernel)
    layer.tile = 16
    randomise(layer.to(dtype), seed)
    tokens = Tokens.of(valid, is_global)
    tokens = at_columns(tokens) if kind == "holes" else tokens

    def theirs(leaves: Leaves, x: Tensor) -> Tensor:
        return project_out(leaves, hugging_face(leaves, x, valid, is_global, heads, window))

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    with softmax_in_own_dtype() if double_inside else nullcontext():
        return compare(layer, lambda x: layer(x, tokens).hidden, theirs, (x,), valid)


def run_dilated(seed: int, kernel: str, dtype: torch.dtype) -> Errors:
    """Each head its own dilation t: theirs, undilated, on every t-th token. Padding stands on the right."""
    rng = random.Random(seed)
    heads, width, window = 3, rng.choice([4, 8]), rng.randint(2, 4)
    dilation = [rng.randint(1, 4) for _ in range(heads)]
    batch, length = 2, rng.randint(9, 60)
    valid = padding(rng, batch, length, "right", length // 2)
    layer = zoo.build(
        "longformer", dim=heads * width, heads=heads, causal=False, window=window, dilation=dilation, kernel=kernel
    )
    layer.tile = 16
    randomise(layer.to(dtype), seed)
    none = torch.zeros_like(valid)

    def theirs(leaves: Leaves, x: Tensor) -> Tensor:
        hidden = []
        for head, step in enumerate(dilation):
            out = x.new_zeros(batch, length, width)
            for start in range(step):
                places = slice(start, None, step)
                part = hugging_face(leaves, x[:, places], valid[:, places], none[:, places], heads, window)
                out = out.index_copy(1, torch.arange(length)[places], part[..., head * width : (head + 1) * width])
            hidden.append(out)
        return project_out(leaves, torch.cat(hidden, -1))

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    with softmax_in_own_dtype():
        return compare(layer, lambda x: layer(x, Tokens.of(valid)).hidden, theirs, (x,), valid)


def run_local(seed: int, kernel: str, causal: bool, dtype: torch.dtype) -> Errors:
    """local-attention with `exact_windowsize`: `window` tokens back and, two-sided, as many ahead."""
    from local_attention import LocalAttention

    rng = random.Random(seed)
    heads, width, window = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 7)
    batch, length = 2, rng.randint(1, 70)
    valid = padding(rng, batch, length, rng.choice(["none", "right", "left"]))
    layer = zoo.build("longformer", dim=heads * width, heads=heads, causal=causal, window=window, kernel=kernel)
    layer.tile = 16
    randomise(layer.to(dtype), seed)
    local = LocalAttention(window, causal=causal, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)

    def theirs(leaves: Leaves, x: Tensor) -> Tensor:
        def project(name: str) -> Tensor:
            y = nn.functional.linear(x, leaves[f"{name}.weight"], leaves[f"{name}.bias"])
            return y.unflatten(-1, (heads, width)).transpose(1, 2)

        out = local(project("to_q"), project("to_k"), project("to_v"), mask=valid)
        return project_out(leaves, out.transpose(1, 2).flatten(2))

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    return compare(layer, lambda x: layer(x, Tokens.of(valid)).hidden, theirs, (x,), valid)


def cases() -> Iterator[Case]:
    for seed in range(8):
        kernel = KERNELS[seed % 4]
        for oracle, run, bounds in (
            ("Hugging Face Longformer", partial(run_global, seed, kernel, False), AS_RELEASED),
            ("Hugging Face Longformer, its softmax in float64", partial(run_global, seed, kernel, True), EXACT),
            ("Hugging Face Longformer, dilated, its softmax in float64", partial(run_dilated, seed, kernel), USUAL),
            ("local-attention, causal", partial(run_local, seed, kernel, True), USUAL),
            ("local-attention, two-sided", partial(run_local, seed, kernel, False), USUAL),
        ):
            yield Case("longformer", oracle, f"seed {seed}, {kernel}", run, bounds)
