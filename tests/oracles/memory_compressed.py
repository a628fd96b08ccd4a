"""Memory-compressed attention against the package memory-compressed-attention, at lengths of whole groups.

Its scores are scaled by the model's width, its projections into heads have no bias, and its `input_mask` compares two
masks by "<", which hides what should be seen: no case has padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import attention_zoo as zoo

from .case import Case, Errors, Leaves, compare, randomise, vectors


def run(seed: int, causal: bool, dtype: torch.dtype) -> Errors:
    """Random widths and compression; nulls that are not zero."""
    from memory_compressed_attention import MemoryCompressedAttention

    rng = random.Random(seed)
    heads, width, compression = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 5)
    batch, length, dim = 2, compression * rng.randint(1, 15), heads * width
    layer = zoo.build(
        "memory_compressed", dim=dim, heads=heads, causal=causal, compression=compression, bias="out", scale=dim**-0.5
    )
    randomise(layer.to(dtype), seed)
    with torch.no_grad():
        layer.compress.weight.mul_(width**-0.5)  # to unit scale: it sums over the channels of a head, too
    theirs = MemoryCompressedAttention(dim, heads, causal, compression).to(dtype)

    def released(leaves: Leaves, x: Tensor) -> Tensor:
        weights = {
            "to_qkv.weight": torch.cat([leaves[f"to_{name}.weight"] for name in "qkv"]),
            "null_k": leaves["null_key"].view(1, 1, -1),
            "null_v": leaves["null_value"].view(1, 1, -1),
        }
        for kind in ("weight", "bias"):
            weights[f"compress_fn.conv.{kind}"] = leaves[f"compress.{kind}"]
            weights[f"to_out.{kind}"] = leaves[f"to_out.{kind}"]
        return torch.func.functional_call(theirs, weights, (x,))

    x = vectors(seed, batch, length, dim, dtype=dtype)
    return compare(layer, lambda x: layer(x).hidden, released, (x,), torch.ones(batch, length, dtype=torch.bool))


def cases() -> Iterator[Case]:
    for seed in range(8):
        causal = seed % 2 == 0
        name = f"seed {seed}, {'causal' if causal else 'two-sided'}"
        yield Case("memory_compressed", "memory-compressed-attention", name, partial(run, seed, causal))
