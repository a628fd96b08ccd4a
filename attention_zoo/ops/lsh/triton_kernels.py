"""What LSH attention does on CUDA beside the attention of its chunks: keys from queries, and rounds put together.

Vectors of tokens are [M, H, D], those of sorted slots [H, slots, D] in float32; `slots` [H, R, M] says where a token
stands in each round. A program takes T tokens of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _factor(x, ridge):
    """1 / norm, of rows; zero for a row of zeros."""
    square = tl.sum(x * x, 1) + ridge
    return tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)


@triton.jit
def normalise(q, k, q_m, q_h, k_m, k_h, M, ridge, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    token, h = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (token < M)[:, None] & (d < D)[None, :]
    x = tl.load(q + token[:, None] * q_m + h * q_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
    key = x * _factor(x, ridge)[:, None]
    tl.store(k + token[:, None] * k_m + h * k_h + d[None, :], key.to(k.dtype.element_ty), mask=inside)


@triton.jit
def merge_rounds(
    rows, lse, slots, v, out, total, v_m, v_h, o_m, o_h, M, count, R: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Rounds weighted by their log-sum-exp; a token that no round shows anything gets its own value."""
    token, h = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    here = token < M
    inside = here[:, None] & (d < D)[None, :]
    top = tl.full([T], -float("inf"), tl.float32)
    for r in tl.static_range(R):
        slot = tl.load(slots + (h * R + r) * M + token, mask=here, other=0)
        top = tl.maximum(top, tl.load(lse + h * count + slot, mask=here, other=-float("inf")))
    anchor = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.zeros([T], tl.float32)
    mixed = tl.zeros([T, BD], tl.float32)
    for r in tl.static_range(R):
        slot = tl.load(slots + (h * R + r) * M + token, mask=here, other=0)
        share = tl.exp(tl.load(lse + h * count + slot, mask=here, other=-float("inf")) - anchor)
        weight += share
        mixed += share[:, None] * tl.load(rows + (h * count + slot)[:, None] * D + d[None, :], mask=inside, other=0.0)
    some = weight > 0
    safe = tl.where(some, weight, 1.0)
    alone = tl.load(v + token[:, None] * v_m + h * v_h + d[None, :], mask=inside & ~some[:, None], other=0.0)
    result = tl.where(some[:, None], mixed / safe[:, None], alone.to(tl.float32))
    tl.store(out + token[:, None] * o_m + h * o_h + d[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(total + h * M + token, tl.where(some, anchor + tl.log(safe), -float("inf")), mask=here)


@triton.jit
def join_gradients(
    dq_rows, dk_rows, dv_rows, slots, q, grad, total, dq, dv, q_m, q_h, g_m, g_h, o_m, o_h, M, count, ridge,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of all rounds, in their order; those of keys go through the norm to the queries."""
    token, h = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    here = token < M
    inside = here[:, None] & (d < D)[None, :]
    for_q = tl.zeros([T, BD], tl.float32)
    for_k = tl.zeros([T, BD], tl.float32)
    for_v = tl.zeros([T, BD], tl.float32)
    for r in tl.static_range(R):
        slot = tl.load(slots + (h * R + r) * M + token, mask=here, other=0)
        at = (h * count + slot)[:, None] * D + d[None, :]
        for_q += tl.load(dq_rows + at, mask=inside, other=0.0)
        for_k += tl.load(dk_rows + at, mask=inside, other=0.0)
        for_v += tl.load(dv_rows + at, mask=inside, other=0.0)
    x = tl.load(q + token[:, None] * q_m + h * q_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = _factor(x, ridge)[:, None]
    key = x * factor
    for_q += (for_k - key * tl.sum(key * for_k, 1)[:, None]) * factor
    alone = tl.load(total + h * M + token, mask=here, other=0.0) == -float("inf")
    for_v += tl.load(grad + token[:, None] * g_m + h * g_h + d[None, :], mask=inside & alone[:, None], other=0.0).to(
        tl.float32
    )
    tl.store(dq + token[:, None] * o_m + h * o_h + d[None, :], for_q.to(dq.dtype.element_ty), mask=inside)
    tl.store(dv + token[:, None] * o_m + h * o_h + d[None, :], for_v.to(dv.dtype.element_ty), mask=inside)
