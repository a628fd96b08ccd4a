"""The device code of ops/relative/triton.py: tiles of N queries and N keys, with 2N of the distances between them.

Most tiles are seen whole: they are not asked which of their pairs are seen. `factor` is `scale` with log2(e) folded in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attention_zoo.ops.triton.device import LOG2E, ended, load_rows, running, save_rows, statistics


@triton.jit
def _load(at, row, stride, limit, D: tl.constexpr, BD: tl.constexpr, FAR: tl.constexpr):
    """[rows, D] of a matrix of `limit` rows; zeros outside."""
    return load_rows(at, row, stride, (row >= 0) & (row < limit), D, BD, FAR)


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
def _seen(oldest, column, key):
    return (key[None, :] >= oldest[:, None]) & (key[None, :] <= column[:, None])


@triton.jit
def _scores(to_keys, to_distances, keys, table, scale, N: tl.constexpr):
    content = tl.dot(to_keys, tl.trans(keys), input_precision="ieee")
    product = tl.dot(to_distances, tl.trans(table), input_precision="ieee")
    return (content + _diagonals(product, N)) * scale


@triton.jit
def forward(
    q, k, v, r, u, w, first, low, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, o_b, o_h, o_n, f_b, low_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    m, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    row = m * N + tl.arange(0, N)
    column = row + (S - L)
    oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
    newest = tl.max(oldest, 0)
    queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD, FAR)
    to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    factor = scale * LOG2E
    top = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    mixed = tl.zeros([N, BD], tl.float32)
    for start in range(tl.load(low + b * low_b + m), tl.minimum(m * N + N, L) + (S - L), N):
        key = start + tl.arange(0, N)
        keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD, FAR)
        values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD, FAR)
        # row t of the falling table is distance T - 1 - t
        farthest = T - 1 - (m * N + (S - L) + N - 1 - start)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD, FAR)
        scores = _scores(to_keys, to_distances, keys, table, factor, N)
        if (start < newest) | (start + N > m * N + (S - L) + 1):
            scores = tl.where(_seen(oldest, column, key), scores, -float("inf"))
        top, total, mixed = running(top, total, mixed, scores, values)
    mixed, found = ended(top, total, mixed)
    save_rows(out + b * o_b + h * o_h, row, o_n, row < L, mixed, D, BD, FAR)
    tl.store(lse + z * L + row, found, mask=row < L)


@triton.jit
def _tile_gradients(
    to_keys, to_distances, keys, values, table, grads, base, shift, masked, oldest, column, key, scale, N: tl.constexpr
):
    """Weights and the gradient of the scores (before `scale`) of one tile; `scale` is for powers of two here."""
    scores = _scores(to_keys, to_distances, keys, table, scale, N)
    weights = tl.exp2(scores - base[:, None])
    if masked:
        weights = tl.where(_seen(oldest, column, key), weights, 0.0)
    dweights = tl.dot(grads, tl.trans(values), input_precision="ieee")
    return weights, weights * (dweights - shift[:, None])


@triton.jit
def backward_q(
    q, k, v, r, u, w, first, low, grad, delta, lse, dq, du, dw,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, o_b, o_h, o_n, f_b, low_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    m, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    row = m * N + tl.arange(0, N)
    column = row + (S - L)
    oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
    newest = tl.max(oldest, 0)
    queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD, FAR)
    grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD, FAR)
    base, shift = statistics(lse + z * L, delta + z * L, row, row < L)
    to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
    factor = scale * LOG2E
    for_keys = tl.zeros([N, BD], tl.float32)
    for_distances = tl.zeros([N, BD], tl.float32)
    for start in range(tl.load(low + b * low_b + m), tl.minimum(m * N + N, L) + (S - L), N):
        key = start + tl.arange(0, N)
        keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD, FAR)
        values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD, FAR)
        farthest = T - 1 - (m * N + (S - L) + N - 1 - start)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD, FAR)
        masked = (start < newest) | (start + N > m * N + (S - L) + 1)
        _, dscores = _tile_gradients(
            to_keys, to_distances, keys, values, table, grads, base, shift, masked, oldest, column, key, factor, N
        )
        for_keys += tl.dot(dscores.to(keys.dtype), keys, input_precision="ieee")
        for_distances += tl.dot(_from_diagonals(dscores, N).to(table.dtype), table, input_precision="ieee")
    save_rows(dq + b * o_b + h * o_h, row, o_n, row < L, (for_keys + for_distances) * scale, D, BD, FAR)
    # of u and w each program leaves its share, to be summed outside
    d = tl.arange(0, BD)
    share = (z * tl.num_programs(0) + m) * D + d
    tl.store(du + share, tl.sum(for_keys, 0) * scale, mask=d < D)
    tl.store(dw + share, tl.sum(for_distances, 0) * scale, mask=d < D)


@triton.jit
def backward_kv(
    q, k, v, r, u, w, first, own, last, grad, delta, lse, dk, dv, dk_own, dv_own,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, o_b, o_h, o_n, f_b, own_b, last_b,
    H, L, S, T, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    key = n * N + tl.arange(0, N)
    keys = _load(k + b * k_b + h * k_h, key, k_n, S, D, BD, FAR)
    values = _load(v + b * v_b + h * v_h, key, v_n, S, D, BD, FAR)
    factor = scale * LOG2E
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
        queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD, FAR)
        grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD, FAR)
        base, shift = statistics(lse + z * L, delta + z * L, row, row < L)
        to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
        to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
        farthest = T - 1 - (start + (S - L) + N - 1 - n * N)
        table = _load(r + h * r_h, farthest + tl.arange(0, 2 * N), r_n, T, D, BD, FAR)
        masked = (n * N < tl.max(oldest, 0)) | (n * N + N > start + (S - L) + 1)
        weights, dscores = _tile_gradients(
            to_keys, to_distances, keys, values, table, grads, base, shift, masked, oldest, column, key, factor, N
        )
        inside = key[None, :] >= border[:, None]
        every_k += tl.dot(tl.trans(dscores.to(queries.dtype)), to_keys, input_precision="ieee")
        every_v += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision="ieee")
        mine, gains = tl.where(inside, weights, 0.0), tl.where(inside, dscores, 0.0)
        own_k += tl.dot(tl.trans(gains.to(queries.dtype)), to_keys, input_precision="ieee")
        own_v += tl.dot(tl.trans(mine.to(grads.dtype)), grads, input_precision="ieee")
    to = b * o_b + h * o_h
    save_rows(dk + to, key, o_n, key < S, every_k * scale, D, BD, FAR)
    save_rows(dv + to, key, o_n, key < S, every_v, D, BD, FAR)
    save_rows(dk_own + to, key, o_n, key < S, own_k * scale, D, BD, FAR)
    save_rows(dv_own + to, key, o_n, key < S, own_v, D, BD, FAR)


@triton.jit
def backward_r(
    q, k, v, r, u, w, first, grad, delta, lse, dr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, r_h, r_n, g_b, g_h, g_n, f_b,
    H, L, S, T, rows, scale, D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """N distances against some `rows` of the queries; the sum over pieces of queries is taken outside."""
    t, piece, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = z // H, z % H
    falling = t * N + tl.arange(0, N)
    table = _load(r + h * r_h, falling, r_n, T, D, BD, FAR)
    factor = scale * LOG2E
    total = tl.zeros([N, BD], tl.float32)
    for start in range(piece * rows, tl.minimum(piece * rows + rows, L), N):
        row = start + tl.arange(0, N)
        oldest = tl.load(first + b * f_b + row, mask=row < L, other=S)
        # distance T - 1 - falling of query `column` is the key column - (T - 1) + falling: 2N neighbours for the tile
        leftmost = start + (S - L) - (T - 1) + t * N
        if (leftmost + 2 * N > tl.min(oldest, 0)) & (leftmost < S):
            queries = _load(q + b * q_b + h * q_h, row, q_n, L, D, BD, FAR)
            grads = _load(grad + b * g_b + h * g_h, row, g_n, L, D, BD, FAR)
            base, shift = statistics(lse + z * L, delta + z * L, row, row < L)
            to_keys = (queries.to(tl.float32) + _vector(u + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
            to_distances = (queries.to(tl.float32) + _vector(w + h * D, D, BD)[None, :]).to(q.dtype.element_ty)
            wide = leftmost + tl.arange(0, 2 * N)
            keys = _load(k + b * k_b + h * k_h, wide, k_n, S, D, BD, FAR)
            values = _load(v + b * v_b + h * v_h, wide, v_n, S, D, BD, FAR)
            # here the keys move and the distances stand
            i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
            content = tl.gather(tl.dot(to_keys, tl.trans(keys), input_precision="ieee"), i + j, 1)
            scores = (content + tl.dot(to_distances, tl.trans(table), input_precision="ieee")) * factor
            weights = tl.exp2(scores - base[:, None])
            if (leftmost < tl.max(oldest, 0)) | (t * N + N > T):
                weights = tl.where((leftmost + i + j >= oldest[:, None]) & (falling < T)[None, :], weights, 0.0)
            dweights = tl.gather(tl.dot(grads, tl.trans(values), input_precision="ieee"), i + j, 1)
            dscores = weights * (dweights - shift[:, None])
            total += tl.dot(tl.trans(dscores.to(queries.dtype)), to_distances, input_precision="ieee")
    save_rows(dr + (z * tl.num_programs(1) + piece) * T * D, falling, D, falling < T, total * scale, D, BD, FAR)
