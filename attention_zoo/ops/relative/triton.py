"""Triton kernels for relative attention: the shift of the distance scores happens inside a tile, on chip.

softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V, as in ops/relative/chunks.py, for keys that stand in columns as
in positions. The distances in a tile of n queries and n keys are 2n - 1 neighbours, so a tile multiplies its queries by
2n rows of the table and reads the product along its diagonals (`tl.gather`): one product more than plain attention, of
double width, and no score ever leaves the chip. Backward recomputes in three kernels without atomics: queries walk keys
(dq, du, dw), keys walk queries (dk, dv), distances walk queries (dr). O(L·reach) time, O(L·D) memory.

Distances count from the largest to 0 in the table, as in ops/relative/chunks.py. Float32 sums; products in the tensors'
own type. Letters: B batch, H heads, L queries, S keys, D head width, T distances.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

TILE = 64
"""Queries and keys of a tile; 16 in the interpreter's tests."""
WIDEST_HEAD = 128


def refuse(head_width: int, dtype: torch.dtype) -> str | None:
    """Why operands of this width and type cannot run, or None."""
    if head_width > WIDEST_HEAD:
        return f"heads of width {head_width} do not fit on chip, at most {WIDEST_HEAD} do"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its products are not exact in {dtype}".replace("torch.", "")
    return None


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load(at, row, stride, limit, D: tl.constexpr, BD: tl.constexpr):
    """[rows, D] of a matrix of `limit` rows; zeros outside."""
    d = tl.arange(0, BD)
    inside = ((row >= 0) & (row < limit))[:, None] & (d < D)[None, :]
    return tl.load(at + row[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _save(at, row, stride, limit, value, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    inside = ((row >= 0) & (row < limit))[:, None] & (d < D)[None, :]
    tl.store(at + row[:, None].to(tl.int64) * stride + d[None, :], value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _vector(at, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(at + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _diagonals(product, N: tl.constexpr):
    """[N, 2N] over falling distances -> [N, N] over keys: element (i, j) is the product's (i, N - 1 - i + j)."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    return tl.gather(product, N - 1 - i + j, 1)


@triton.jit
def _from_diagonals(scores, N: tl.constexpr):
    """The reverse: [N, N] over keys -> [N, 2N] over falling distances, zeros where no key lies."""
    i, t = tl.arange(0, N)[:, None], tl.arange(0, 2 * N)[None, :]
    j = t - (N - 1) + i
    inside = (j >= 0) & (j < N)
    return tl.where(inside, tl.gather(scores, tl.where(inside, j, 0), 1), 0.0)


@triton.jit
def _scores(to_keys, to_distances, keys, table, scale, N: tl.constexpr):
    content = tl.dot(to_keys, tl.trans(keys), input_precision="ieee")
    product = tl.dot(to_distances, tl.trans(table), input_precision="ieee")
    return (content + _diagonals(product, N)) * scale


@triton.jit
def _forward(
    q, k, v, r, u, w, first, low, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, o_b, o_h, o_n, f_b, low_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    m, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    row = m * N + tl.arange(0, N)
    column = row + (S - L)
    oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
    queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD)
    to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    top = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    mixed = tl.zeros([N, BD], tl.float32)
    for start in range(tl.load(low + b * low_b + m), tl.minimum(m * N + N, L) + (S - L), N):
        key = start + tl.arange(0, N)
        keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD)
        values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD)
        # row t of the falling table is distance T - 1 - t
        farthest = T - 1 - (m * N + (S - L) + N - 1 - start)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD)
        scores = _scores(to_keys, to_distances, keys, table, scale, N)
        seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= column[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(top - anchor)
        weights = tl.exp(scores - anchor[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    _save(out + b * o_b + h * o_h, row, o_n, L, mixed / safe[:, None], D, BD)
    tl.store(lse + z * L + row, tl.where(some, top + tl.log(safe), -float("inf")), mask=row < L)


@triton.jit
def _tile_gradients(
    to_keys, to_distances, keys, values, table, grads, base, shift, oldest, column, key, scale, N: tl.constexpr
):
    """Weights and the gradient of the scores (before `scale`) of one tile."""
    scores = _scores(to_keys, to_distances, keys, table, scale, N)
    seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= column[:, None])
    weights = tl.where(seen, tl.exp(scores - base[:, None]), 0.0)
    dweights = tl.dot(grads, tl.trans(values), input_precision="ieee")
    return weights, weights * (dweights - shift[:, None])


@triton.jit
def _backward_q(
    q, k, v, r, u, w, first, low, grad, delta, lse, dq, du, dw,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, o_b, o_h, o_n, f_b, low_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    m, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    row = m * N + tl.arange(0, N)
    column = row + (S - L)
    oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
    queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD)
    grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD)
    base = tl.load(lse + z * L + row, mask=row < L, other=float("inf"))
    shift = tl.load(delta + z * L + row, mask=row < L, other=0.0)
    to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    for_keys = tl.zeros([N, BD], tl.float32)
    for_distances = tl.zeros([N, BD], tl.float32)
    for start in range(tl.load(low + b * low_b + m), tl.minimum(m * N + N, L) + (S - L), N):
        key = start + tl.arange(0, N)
        keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD)
        values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD)
        farthest = T - 1 - (m * N + (S - L) + N - 1 - start)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD)
        _, dscores = _tile_gradients(
            to_keys, to_distances, keys, values, table, grads, base, shift, oldest, column, key, scale, N
        )
        for_keys += tl.dot(dscores.to(keys.dtype), keys, input_precision="ieee")
        for_distances += tl.dot(_from_diagonals(dscores, N).to(table.dtype), table, input_precision="ieee")
    _save(dq + b * o_b + h * o_h, row, o_n, L, (for_keys + for_distances) * scale, D, BD)
    # of u and w each program leaves its share, to be summed outside
    d = tl.arange(0, BD)
    share = (z * tl.num_programs(0) + m) * D + d
    tl.store(du + share, tl.sum(for_keys, 0) * scale, mask=d < D)
    tl.store(dw + share, tl.sum(for_distances, 0) * scale, mask=d < D)


@triton.jit
def _backward_kv(
    q, k, v, r, u, w, first, own, last, grad, delta, lse, dk, dv, dk_own, dv_own,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, o_b, o_h, o_n, f_b, own_b, last_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    key = n * N + tl.arange(0, N)
    keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD)
    values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD)
    every_k = tl.zeros([N, BD], tl.float32)
    every_v = tl.zeros([N, BD], tl.float32)
    own_k = tl.zeros([N, BD], tl.float32)
    own_v = tl.zeros([N, BD], tl.float32)
    # the first query tile that holds a query not before these keys
    begin = tl.maximum(n * N - (S - L), 0) // N * N
    for start in range(begin, tl.load(last + b * last_b + n), N):
        row = start + tl.arange(0, N)
        column = row + (S - L)
        oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
        border = tl.load(own + b * own_b + row, mask=row < L, other=S)
        queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD)
        grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD)
        base = tl.load(lse + z * L + row, mask=row < L, other=float("inf"))
        shift = tl.load(delta + z * L + row, mask=row < L, other=0.0)
        to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
        to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
        farthest = T - 1 - (start + (S - L) + N - 1 - n * N)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD)
        weights, dscores = _tile_gradients(
            to_keys, to_distances, keys, values, table, grads, base, shift, oldest, column, key, scale, N
        )
        inside = key[None, :] >= border[:, None]
        every_k += tl.dot(tl.trans(dscores.to(queries.dtype)), to_keys, input_precision="ieee")
        every_v += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision="ieee")
        mine, gains = tl.where(inside, weights, 0.0), tl.where(inside, dscores, 0.0)
        own_k += tl.dot(tl.trans(gains.to(queries.dtype)), to_keys, input_precision="ieee")
        own_v += tl.dot(tl.trans(mine.to(grads.dtype)), grads, input_precision="ieee")
    to = b * o_b + h * o_h
    _save(dk + to, key, o_n, S, every_k * scale, D, BD)
    _save(dv + to, key, o_n, S, every_v, D, BD)
    _save(dk_own + to, key, o_n, S, own_k * scale, D, BD)
    _save(dv_own + to, key, o_n, S, own_v, D, BD)


@triton.jit
def _backward_r(
    q, k, v, r, u, w, first, grad, delta, lse, dr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, f_b,
    H, L, S, T, rows, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N distances against some `rows` of the queries; the sum over pieces of queries is taken outside."""
    t, piece, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = z // H, z % H
    falling = t * N + tl.arange(0, N)
    table = _load(r + h * r_h, falling, r_n, T, D, BD)
    total = tl.zeros([N, BD], tl.float32)
    for start in range(piece * rows, tl.minimum(piece * rows + rows, L), N):
        row = start + tl.arange(0, N)
        column = row + (S - L)
        oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
        # distance T - 1 - falling of query `column` is the key column - (T - 1) + falling: 2N neighbours for the tile
        leftmost = start + (S - L) - (T - 1) + t * N
        if (leftmost + 2 * N > tl.min(oldest, 0)) & (leftmost < S):
            queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD)
            grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD)
            base = tl.load(lse + z * L + row, mask=row < L, other=float("inf"))
            shift = tl.load(delta + z * L + row, mask=row < L, other=0.0)
            to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
            to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
            wide = leftmost + tl.arange(0, 2 * N)
            keys = _load(k + b * k_b + h * k_h, wide, k_n, S, D, BD)
            values = _load(v + b * v_b + h * v_h, wide, v_n, S, D, BD)
            # here the keys move and the distances stand
            i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
            content = tl.gather(tl.dot(to_keys, tl.trans(keys), input_precision="ieee"), i + j, 1)
            scores = (content + tl.dot(to_distances, tl.trans(table), input_precision="ieee")) * scale
            key = leftmost + i + j
            seen = (key >= oldest[:, None]) & (key <= column[:, None]) & (falling < T)[None, :]
            weights = tl.where(seen, tl.exp(scores - base[:, None]), 0.0)
            dweights = tl.gather(tl.dot(grads, tl.trans(values), input_precision="ieee"), i + j, 1)
            dscores = weights * (dweights - shift[:, None])
            total += tl.dot(tl.trans(dscores.to(queries.dtype)), to_distances, input_precision="ieee")
    _save(dr + (z * tl.num_programs(1) + piece) * T * D, falling, D, T, total * scale, D, BD)


# --- launching them --------------------------------------------------------------------------------------------------


def relative_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    k_own: Float[Tensor, "B H S D"],
    v_own: Float[Tensor, "B H S D"],
    r: Float[Tensor, "T H D"],
    u: Float[Tensor, "H D"],
    w: Float[Tensor, "H D"],
    first: Int[Tensor, "#B L"],
    own: Int[Tensor, "#B L"],
    *,
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """See ops/relative/chunks.py, which says what `first` and `own` are; query i stands in column S - L + i."""
    out: Tensor = _Relative.apply(q, k, v, k_own, v_own, r, u, w, first.int(), own.int(), scale)
    return out


class _Relative(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, first, own, scale: float) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, H, L, D = q.shape
        out = q.new_empty(B, L, H, D).transpose(1, 2)
        lse = q.new_empty(B, H, L, dtype=torch.float32)
        table = _falling(r, q.dtype)
        tiles = triton.cdiv(L, TILE)
        low = _oldest_of_tiles(first, k.shape[2])
        _forward[(tiles, B * H)](
            q, k, v, table, u.contiguous(), w.contiguous(), first.contiguous(), low, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table.stride()[:2], *out.stride()[:3],
            *_batch(first, low), H, L, k.shape[2], len(r), scale, **_meta(D),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, r, u, w, first, own, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, first, own, out, lse = saved
        (B, H, L, D), S, T, scale = q.shape, k.shape[2], len(r), ctx.scale
        grad = grad.to(q.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).contiguous()
        lse = torch.where(lse == -torch.inf, torch.inf, lse).contiguous()
        first, own, u_, w_ = first.contiguous(), own.contiguous(), u.contiguous(), w.contiguous()
        table = _falling(r, q.dtype)
        given = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table.stride()[:2], *grad.stride()[:3])
        sizes, tiles = (H, L, S, T), triton.cdiv(L, TILE)

        dq = q.new_empty(B, L, H, D).transpose(1, 2)
        du, dw = (torch.empty(B, H, tiles, D, device=q.device) for _ in range(2))
        low = _oldest_of_tiles(first, S)
        _backward_q[(tiles, B * H)](
            q, k, v, table, u_, w_, first, low, grad, delta, lse, dq, du, dw, *given, *dq.stride()[:3],
            *_batch(first, low), *sizes, scale, **_meta(D),
        )  # fmt: skip

        gradients = [k.new_empty(B, S, H, D).transpose(1, 2) for _ in range(4)]
        last = _last_seer(first, S)
        _backward_kv[(triton.cdiv(S, TILE), B * H)](
            q, k, v, table, u_, w_, first, own, last, grad, delta, lse, *gradients, *given, *gradients[0].stride()[:3],
            *_batch(first, own, last), *sizes, scale, **_meta(D),
        )  # fmt: skip

        # enough programs to fill a device, also where there are few distances
        pieces = max(1, min(tiles, 1024 // max(1, triton.cdiv(T, TILE) * B * H)))
        rows = triton.cdiv(tiles, pieces) * TILE
        dr = torch.empty(B, H, pieces, T, D, device=q.device)
        _backward_r[(triton.cdiv(T, TILE), pieces, B * H)](
            q, k, v, table, u_, w_, first, grad, delta, lse, dr, *given, *_batch(first), *sizes, rows, scale,
            **_meta(D),
        )  # fmt: skip
        dr = dr.sum((0, 2)).flip(1).transpose(0, 1).to(r.dtype)
        return dq, *gradients, dr, du.sum((0, 2)).to(u.dtype), dw.sum((0, 2)).to(w.dtype), None, None, None


def _falling(r: Float[Tensor, "T H D"], dtype: torch.dtype) -> Float[Tensor, "H T D"]:
    return r.to(dtype).transpose(0, 1).flip(1).contiguous()


def _oldest_of_tiles(first: Int[Tensor, "#B L"], S: int) -> Int[Tensor, "#B tiles"]:
    """The oldest key that any query of a tile sees."""
    padded = torch.nn.functional.pad(first, (0, -first.shape[1] % TILE), value=S)
    return padded.unflatten(1, (-1, TILE)).amin(-1).int().contiguous()


def _last_seer(first: Int[Tensor, "#B L"], S: int) -> Int[Tensor, "#B tiles"]:
    """One past the last query that sees any key of a tile of keys. Queries between do not all see it."""
    L = first.shape[1]
    # what the oldest key seen from here on is; falls to the left, so that it can be searched
    oldest = first.flip(1).cummin(1).values
    ends = torch.arange(TILE, S + TILE, TILE, device=first.device, dtype=first.dtype).clamp(max=S)
    seers = torch.searchsorted(-oldest.contiguous(), -ends.expand(len(first), -1).contiguous(), right=True)
    return (L - seers).int().contiguous()


def _batch(*tables: Tensor) -> tuple[int, ...]:
    """Steps from one sequence to the next: none where one table serves all."""
    return tuple(0 if len(table) == 1 else table.stride(0) for table in tables)


def _meta(D: int) -> dict[str, Any]:
    return {"D": D, "BD": max(16, triton.next_power_of_2(D)), "N": TILE, "num_warps": 4, "num_stages": 2}
