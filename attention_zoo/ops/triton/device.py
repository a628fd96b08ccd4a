"""Device code that our Triton kernels share: rows of a matrix, and a softmax that runs over pieces of the scores.

Scores are kept in powers of two, which is what the hardware has (exp2): whoever calls folds log2(e) into their scale.
Log-sum-exps that leave or enter are natural ones. Letters: D channels of a head, BD the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(row, stride, BD: tl.constexpr, FAR: tl.constexpr):
    """FAR says that an offset passes 31 bits; else offsets are 32 bits wide, which spares registers."""
    if FAR:
        row = row.to(tl.int64)
    return row[:, None] * stride + tl.arange(0, BD)[None, :]


@triton.jit
def load_rows(at, row, stride, there, D: tl.constexpr, BD: tl.constexpr, FAR: tl.constexpr):
    """[rows, D] of a matrix; zeros where a row is not there."""
    inside = there[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(at + _places(row, stride, BD, FAR), mask=inside, other=0.0)


@triton.jit
def save_rows(at, row, stride, there, value, D: tl.constexpr, BD: tl.constexpr, FAR: tl.constexpr):
    inside = there[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(at + _places(row, stride, BD, FAR), value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def running(top, total, mixed, scores, values):
    """The softmax so far (largest score, sum of weights, weighted sum of values), some keys later."""
    higher = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
    shrink = tl.exp2(top - anchor)
    weights = tl.exp2(scores - anchor[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def ended(top, total, mixed):
    """The output and its log-sum-exp: zeros and -inf where nothing was seen."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    return mixed / safe[:, None], tl.where(some, (top + tl.log2(safe)) / LOG2E, -float("inf"))


@triton.jit
def statistics(lse, delta, row, there):
    """Of the rows of queries, the log-sum-exp in powers of two, and delta; a row that sees nothing weighs nothing."""
    base = tl.load(lse + row, mask=there, other=float("inf"))
    base = tl.where(base == -float("inf"), float("inf"), base)
    return base * LOG2E, tl.load(delta + row, mask=there, other=0.0)
