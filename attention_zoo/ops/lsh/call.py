"""Which kernel runs attention of hashed tokens: the facts that they need, each with its sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo.layout.kernel import Kernel, triton_reason
from attention_zoo.ops.lsh.chunks import HashedPlan, dense_attention, lsh_attention

Run = Callable[[Tensor, Tensor, HashedPlan], Tensor]


@dataclass(frozen=True)
class HashedCall:
    """What is to be known of a call.

    Fields:
        once: whether a key that several rounds show counts once.
    """

    device: torch.device
    dtype: torch.dtype
    chunk: int
    head_width: int
    once: bool


def _has_triton(call: HashedCall) -> str | None:
    return triton_reason(call.device)


def _counts_each(call: HashedCall) -> str | None:
    return "it cannot count in how many rounds a pair meets (correct_duplicates)" if call.once else None


def _triton_takes(call: HashedCall) -> str | None:
    if triton_reason(call.device):
        return None
    from attention_zoo.ops.softmax.triton import refuse

    return refuse(call.chunk, call.head_width, call.dtype, call.device)


def _triton(call: HashedCall) -> Run:
    from attention_zoo.ops.lsh.triton import hashed_attention

    return hashed_attention


KERNELS: tuple[Kernel[HashedCall], ...] = (
    Kernel("triton", _triton, (_has_triton, _counts_each, _triton_takes), "sorted chunks by one Triton kernel"),
    Kernel("chunks", lambda call: lsh_attention, (), "sorted chunks, a few at a time; backward recomputes"),
    Kernel("dense", lambda call: dense_attention, (), "all pairs of tokens, M x M: for checking"),
)
"""Fastest first; `run` gives the function (qk, v, plan) -> output."""
