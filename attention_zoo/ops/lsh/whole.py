"""Hashed attention of documents that every window holds whole: hashes do not matter, and nothing is sorted.

All rounds show a token the same keys, so that it is attention with shared queries and keys (k = q / |q|) to everybody
but itself; a token that sees nobody else takes its own value. One call of torch's fused kernel, by a mask that all
heads share. O(n²) time for documents of n tokens, O(M·D + n²) memory; on CPU alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.ops.lsh.chunks import _keys
from attention_zoo.ops.softmax.function import differentiable_once
from attention_zoo.ops.softmax.fused import fused

LONGEST = 1024
"""Tokens of a document whose mask is worth its memory."""


class Together(NamedTuple):
    """One call, but for its vectors.

    Fields:
        sizes: tokens of each of K documents, which follow each other in the ragged list.
        causal, scale, epsilon: see `HashedPlan`.
    """

    sizes: Int[np.ndarray, " K"]
    causal: bool
    scale: float
    epsilon: float


def whole_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: Together) -> Float[Tensor, "M H D"]:
    """What each token finds."""
    sizes, causal, scale, epsilon = plan
    n = int(sizes.max())
    if n == 1:
        return v + q.flatten()[:0].sum().to(v.dtype)  # a gradient of zeros
    with torch.autocast(q.device.type, enabled=False):
        k = _Unit.apply(q, epsilon)
        places = _places(sizes, n)
        queries, keys, values = (_laid(x.to(k.dtype), places, len(sizes), n) for x in (q, k, v))
        bias = _mask(n, causal, k.dtype) if places is None else _made(_hidden(sizes, n, causal), k.dtype)
        found = fused(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), bias, scale=scale)
        flat = found.transpose(1, 2).flatten(0, 1)
        out = flat if places is None else flat.index_select(0, tensor_of(places, q.device))
        return out.to(v.dtype)


def _places(sizes: Array, n: int) -> Int[np.ndarray, " M"] | None:
    """Where tokens stand among K times n; None: everywhere."""
    if bool((sizes == n).all()):
        return None
    ends = sizes.cumsum()
    return np.arange(ends[-1]) + np.repeat(np.arange(len(sizes)) * n - (ends - sizes), sizes)


def _laid(x: Float[Tensor, "M H D"], places: Array | None, documents: int, n: int) -> Float[Tensor, "K n H D"]:
    """Document beside document, with zeros behind those of fewer tokens."""
    if places is not None:
        x = x.new_zeros(documents * n, *x.shape[1:]).index_copy(0, tensor_of(places, x.device), x)
    return x.unflatten(0, (documents, n))


def _hidden(sizes: Array, n: int, causal: bool) -> Float[np.ndarray, "K n n"]:
    """-inf for the token itself, causally for the future, and for what is no token; but each sees itself alone where it
    would see nobody.
    """
    column, own = np.arange(n), np.eye(n, dtype=bool)
    others = column < column[:, None] if causal else ~own
    seen = others[None] if bool((sizes == n).all()) else others & (column < sizes[:, None])[:, None]
    return np.where(seen | (own & ~seen.any(-1, keepdims=True)), 0.0, -np.inf)


def _made(hidden: Array, dtype: torch.dtype) -> Float[Tensor, "K 1 n n"]:
    return tensor_of(hidden, torch.device("cpu")).to(dtype)[:, None]


@lru_cache(16)
def _mask(n: int, causal: bool, dtype: torch.dtype) -> Float[Tensor, "1 1 n n"]:
    """Of documents of n tokens each."""
    with torch.inference_mode(False):  # it outlives the call
        return _made(_hidden(np.array([n]), n, causal), dtype)


class _Unit(torch.autograd.Function):
    """Queries as keys, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, epsilon: float) -> Tensor:
        k, factor = _keys(q, epsilon)
        ctx.save_for_backward(k, factor)
        ctx.dtype = q.dtype
        return k

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        k, factor = saved
        along = torch.einsum("mhd,mhd->mh", k, grad)[..., None]
        return torch.addcmul(grad, k, along, value=-1).mul_(factor).to(ctx.dtype), None
