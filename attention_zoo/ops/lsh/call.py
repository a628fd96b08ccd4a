"""Which kernel runs attention of hashed tokens: the facts that they need, each with its sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_zoo.layout.host import on_host
from attention_zoo.layout.kernel import Kernel, triton_reason
from attention_zoo.ops.lsh.chunks import dense_attention, lsh_attention
from attention_zoo.ops.lsh.short import short_attention
from attention_zoo.ops.lsh.shown import few_columns
from attention_zoo.ops.lsh.whole import LONGEST, whole_attention

Run = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class HashedCall:
    """What is to be known of a call.

    Fields:
        once: whether a key that several rounds show counts once.
        inside: whether a token attends inside its buckets only.
        slots: places of chunks whose tokens are asked for, of one head in all rounds.
        pairs: query-key pairs that chunks score, of one head.
        all_pairs: those of all documents' tokens, as if each were as long as the longest.
        rounds: of hashing.
        chunks: of the longest document, over all rounds.
        arcs: whether windows show such (ops/lsh/arcs.py).
        whole: whether every window holds its whole document, of which everything is asked for.
        longest: tokens of the longest document.
    """

    device: torch.device
    dtype: torch.dtype
    chunk: int
    head_width: int
    once: bool
    inside: bool
    slots: int
    pairs: int
    all_pairs: int
    rounds: int
    chunks: int
    arcs: bool
    whole: bool
    longest: int


def _has_triton(call: HashedCall) -> str | None:
    return triton_reason(call.device)


def _counts_each(call: HashedCall) -> str | None:
    return "it cannot count in how many rounds a pair meets (correct_duplicates)" if call.once else None


def _triton_takes(call: HashedCall) -> str | None:
    if triton_reason(call.device):
        return None
    from attention_zoo.ops.softmax.triton import refuse

    return refuse(call.chunk, call.head_width, call.dtype, call.device)


def _on_cpu(call: HashedCall) -> str | None:
    return None if on_host(call.device) else f"it runs on CPU, not on {call.device.type}"


def _across_buckets(call: HashedCall) -> str | None:
    return "it tells no buckets apart (attend_across_buckets)" if call.inside else None


def _holds_all(call: HashedCall) -> str | None:
    return None if call.whole else "not every window holds its whole document, of which everything is asked for"


def _has_small_mask(call: HashedCall) -> str | None:
    if call.longest <= LONGEST:
        return None
    return f"documents of {call.longest} tokens are too long for a mask, at most {LONGEST}"


def _tells_buckets(call: HashedCall) -> str | None:
    if call.inside and not call.arcs:
        return "it tells no buckets apart (attend_across_buckets) where short rings of chunks repeat some"
    return None


SLOT = 265
"""Pairs that cost what it takes to gather a slot of a chunk, put back what it found, and the same in backward."""
COMPARED = 5
"""Columns of a product that cost what it takes to compare a pair in one round."""


def _is_short(call: HashedCall) -> str | None:
    # a pair costs two products of head width, and to count in how many windows it is
    width, count = 2 * call.head_width, call.chunks
    if call.arcs and (call.inside or not few_columns(call.chunks, call.rounds)):
        count = COMPARED * call.rounds
    if call.all_pairs * (width + count) <= (call.pairs + SLOT * call.slots) * width:
        return None
    return f"documents are too long: all their pairs are {call.all_pairs}, those of chunks {call.pairs}"


def _triton(call: HashedCall) -> Run:
    from attention_zoo.ops.lsh.triton import hashed_attention

    return hashed_attention


WHOLE: Kernel[HashedCall] = Kernel(
    "whole",
    lambda call: whole_attention,
    (_on_cpu, _across_buckets, _holds_all, _has_small_mask),
    "all pairs of documents that every window holds whole, in one fused call",
)

KERNELS: tuple[Kernel[HashedCall], ...] = (
    Kernel("triton", _triton, (_has_triton, _counts_each, _triton_takes), "sorted chunks by one Triton kernel"),
    WHOLE,
    Kernel(
        "short",
        lambda call: short_attention,
        (_on_cpu, _tells_buckets, _is_short),
        "all pairs of a short document's tokens, each by the times it is shown",
    ),
    Kernel("chunks", lambda call: lsh_attention, (), "sorted chunks, a few at a time; backward recomputes"),
    Kernel("dense", lambda call: dense_attention, (), "all pairs of tokens, M x M: for checking"),
)
"""Fastest first; `run` gives the function (qk, v, `HashedPlan`) -> output, of `WHOLE` (qk, v, `Together`)."""
