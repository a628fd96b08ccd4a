"""The device code of ops/softmax/triton.py: what a program does with one block and its list of others.

A list has those blocks in front that are seen whole, whose pairs need no mask; the rest decides by labels and times. Of
both a program runs a loop of its own. Functions of one step get `scale` with log2(e) folded in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attention_zoo.ops.triton.device import LOG2E, ended, load_rows, running, save_rows, statistics


@triton.jit
def _slots(rows, times, labels, block, first, C: tl.constexpr, BC: tl.constexpr, HAS_ROWS: tl.constexpr):
    """Row, time and label of each slot of a block."""
    lane = tl.arange(0, BC)
    slot = block * C + lane
    label = tl.load(labels + slot, mask=lane < C, other=-3)
    time = tl.load(times + slot, mask=lane < C, other=0)
    if HAS_ROWS:  # noqa: SIM108  (as in the other kernels: a branch that the compiler decides)
        row = tl.load(rows + slot, mask=lane < C, other=0)
    else:
        row = slot - first
    return row, time, label


@triton.jit
def _seen(q_time, q_label, k_time, k_label, CAUSAL: tl.constexpr, STRICT: tl.constexpr):
    """Of slots as a column and as a row."""
    seen = q_label == k_label
    if CAUSAL:
        if STRICT:  # noqa: SIM108
            seen = seen & (k_time < q_time)
        else:
            seen = seen & (k_time <= q_time)
    elif STRICT:
        seen = seen & (k_time != q_time)
    return seen


@triton.jit
def _mix(
    top, total, mixed, queries, time, label, other, link, k, v, weight, k_rows, k_time, k_label, k_n, v_n, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax, one block of keys later."""
    k_row, k_when, k_name = _slots(k_rows, k_time, k_label, other, 0, C, BC, HAS_ROWS)
    keys = load_rows(k, k_row, k_n, k_name >= 0, D, BD, FAR)
    values = load_rows(v, k_row, v_n, k_name >= 0, D, BD, FAR)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if HAS_WEIGHT:
        scores += tl.load(weight + link) * LOG2E
    if MASKED:
        seen = _seen(time[:, None], label[:, None], k_when[None, :], k_name[None, :], CAUSAL, STRICT)
        scores = tl.where(seen, scores, -float("inf"))
    return running(top, total, mixed, scores, values)


@triton.jit
def forward(
    q, k, v, out, lse, links, count, whole, weight, q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, l_b, l_h, q_slots, k_slots,
    N, W, H, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_WHOLE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    g = h // groups
    row, time, label = _slots(
        q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots, n, first, C, BC, HAS_ROWS
    )
    asks = label >= 0
    queries = load_rows(q + b * q_b + h * q_h, row, q_n, asks, D, BD, FAR)
    k, v = k + b * k_b + g * k_h, v + b * v_b + g * v_h
    k_rows, k_time, k_label = k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots
    links, weight = links + (z * N + n) * W, weight + (z * N + n) * W
    factor = scale * LOG2E
    top = tl.full([BC], -float("inf"), tl.float32)
    total = tl.zeros([BC], tl.float32)
    mixed = tl.zeros([BC, BD], tl.float32)
    border = 0
    if HAS_WHOLE:
        border = tl.load(whole + z * N + n)
        for entry in range(border):
            top, total, mixed = _mix(
                top, total, mixed, queries, time, label, tl.load(links + entry), entry, k, v, weight, k_rows, k_time,
                k_label, k_n, v_n, factor, C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, False,
            )  # fmt: skip
    for entry in range(border, tl.load(count + z * N + n)):
        top, total, mixed = _mix(
            top, total, mixed, queries, time, label, tl.load(links + entry), entry, k, v, weight, k_rows, k_time,
            k_label, k_n, v_n, factor, C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, True,
        )  # fmt: skip
    mixed, found = ended(top, total, mixed)
    if HAS_ROWS:
        row = n * C + tl.arange(0, BC)  # results of gathered rows stay in slots: a row may stand in several
        asks = tl.arange(0, BC) < C
    save_rows(out + b * o_b + h * o_h, row, o_n, asks, mixed, D, BD, FAR)
    tl.store(lse + b * l_b + h * l_h + row, found, mask=asks)


@triton.jit
def _pull(
    total, queries, grads, base, shift, time, label, other, link, k, v, weight, k_rows, k_time, k_label, k_n, v_n,
    scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FAR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries (before `scale`), one block of keys later."""
    k_row, k_when, k_name = _slots(k_rows, k_time, k_label, other, 0, C, BC, HAS_ROWS)
    keys = load_rows(k, k_row, k_n, k_name >= 0, D, BD, FAR)
    values = load_rows(v, k_row, v_n, k_name >= 0, D, BD, FAR)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if HAS_WEIGHT:
        scores += tl.load(weight + link) * LOG2E
    weights = tl.exp2(scores - base[:, None])
    if MASKED:
        seen = _seen(time[:, None], label[:, None], k_when[None, :], k_name[None, :], CAUSAL, STRICT)
        weights = tl.where(seen, weights, 0.0)
    dweights = tl.dot(grads, tl.trans(values), input_precision="ieee")
    dscores = weights * (dweights - shift[:, None])
    return tl.dot(dscores.to(keys.dtype), keys, total, input_precision="ieee")


@triton.jit
def backward_q(
    q, k, v, grad, delta, lse, dq, links, count, whole, weight, q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, o_b, o_h, o_n, l_b, l_h, q_slots, k_slots,
    N, W, H, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_WHOLE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    g = h // groups
    row, time, label = _slots(
        q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots, n, first, C, BC, HAS_ROWS
    )
    asks = label >= 0
    queries = load_rows(q + b * q_b + h * q_h, row, q_n, asks, D, BD, FAR)
    grads = load_rows(grad + b * g_b + h * g_h, row, g_n, asks, D, BD, FAR)
    base, shift = statistics(lse + b * l_b + h * l_h, delta + b * l_b + h * l_h, row, asks)
    k, v = k + b * k_b + g * k_h, v + b * v_b + g * v_h
    k_rows, k_time, k_label = k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots
    links, weight = links + (z * N + n) * W, weight + (z * N + n) * W
    factor = scale * LOG2E
    total = tl.zeros([BC, BD], tl.float32)
    border = 0
    if HAS_WHOLE:
        border = tl.load(whole + z * N + n)
        for entry in range(border):
            total = _pull(
                total, queries, grads, base, shift, time, label, tl.load(links + entry), entry, k, v, weight, k_rows,
                k_time, k_label, k_n, v_n, factor, C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, False,
            )  # fmt: skip
    for entry in range(border, tl.load(count + z * N + n)):
        total = _pull(
            total, queries, grads, base, shift, time, label, tl.load(links + entry), entry, k, v, weight, k_rows,
            k_time, k_label, k_n, v_n, factor, C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, True,
        )  # fmt: skip
    if HAS_ROWS:
        row = n * C + tl.arange(0, BC)
        asks = tl.arange(0, BC) < C
    save_rows(dq + b * o_b + h * o_h, row, o_n, asks, total * scale, D, BD, FAR)


@triton.jit
def _push(
    for_keys, for_values, keys, values, k_when, k_name, entry, q, grad, delta, lse, weight, q_rows, q_time, q_label,
    q_n, g_n, N, W, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FAR: tl.constexpr, MASKED: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """The gradients of keys (before `scale`) and values, one block of queries later."""
    row, time, label = _slots(q_rows, q_time, q_label, (entry // W) % N, first, C, BC, HAS_ROWS)
    asks = label >= 0
    queries = load_rows(q, row, q_n, asks, D, BD, FAR)
    grads = load_rows(grad, row, g_n, asks, D, BD, FAR)
    base, shift = statistics(lse, delta, row, asks)
    # keys are the rows here: what is multiplied next is then in the place where it is needed
    scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
    if HAS_WEIGHT:
        scores += tl.load(weight + entry) * LOG2E
    weights = tl.exp2(scores - base[None, :])
    if MASKED:
        seen = _seen(time[None, :], label[None, :], k_when[:, None], k_name[:, None], CAUSAL, STRICT)
        weights = tl.where(seen, weights, 0.0)
    if FOR_V:
        for_values = tl.dot(weights.to(grads.dtype), grads, for_values, input_precision="ieee")
    if FOR_K:
        dweights = tl.dot(values, tl.trans(grads), input_precision="ieee")
        dscores = weights * (dweights - shift[None, :])
        for_keys = tl.dot(dscores.to(queries.dtype), queries, for_keys, input_precision="ieee")
    return for_keys, for_values


@triton.jit
def backward_kv(
    q, k, v, grad, delta, lse, dk, dv, entries, piece_block, piece_start, piece_border, piece_stop, weight,
    q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, l_b, l_h, q_slots, k_slots,
    N, W, H, M, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_WHOLE: tl.constexpr, FAR: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """One piece of the list of a block of keys; both gradients, or one where two would not fit into registers."""
    piece = tl.program_id(0).to(tl.int64)
    block = tl.load(piece_block + piece)
    z = block // M
    b, h = (z // H).to(tl.int64), (z % H).to(tl.int64)
    g = h // groups
    k_row, k_when, k_name = _slots(
        k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots, block % M, 0, C, BC, HAS_ROWS
    )
    keys = load_rows(k + b * k_b + g * k_h, k_row, k_n, k_name >= 0, D, BD, FAR)
    values = keys
    if FOR_K:
        values = load_rows(v + b * v_b + g * v_h, k_row, v_n, k_name >= 0, D, BD, FAR)
    q, grad = q + b * q_b + h * q_h, grad + b * g_b + h * g_h
    lse, delta = lse + b * l_b + h * l_h, delta + b * l_b + h * l_h
    q_rows, q_time, q_label = q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots
    factor = scale * LOG2E
    for_keys = tl.zeros([BC, BD], tl.float32)
    for_values = tl.zeros([BC, BD], tl.float32)
    start, stop = tl.load(piece_start + piece), tl.load(piece_stop + piece)
    if HAS_WHOLE:
        border = tl.load(piece_border + piece)
        for at in range(start, border):
            for_keys, for_values = _push(
                for_keys, for_values, keys, values, k_when, k_name, tl.load(entries + at), q, grad, delta, lse, weight,
                q_rows, q_time, q_label, q_n, g_n, N, W, first, factor,
                C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, False, FOR_K, FOR_V,
            )  # fmt: skip
        start = border
    for at in range(start, stop):
        for_keys, for_values = _push(
            for_keys, for_values, keys, values, k_when, k_name, tl.load(entries + at), q, grad, delta, lse, weight,
            q_rows, q_time, q_label, q_n, g_n, N, W, first, factor,
            C, D, BC, BD, CAUSAL, STRICT, HAS_ROWS, HAS_WEIGHT, FAR, True, FOR_K, FOR_V,
        )  # fmt: skip
    lane, d = tl.arange(0, BC), tl.arange(0, BD)
    where = (piece * C + lane[:, None]) * D + d[None, :]
    inside = (lane < C)[:, None] & (d < D)[None, :]
    if FOR_K:
        tl.store(dk + where, for_keys * scale, mask=inside)
    if FOR_V:
        tl.store(dv + where, for_values, mask=inside)


@triton.jit
def sum_pieces(
    pieces, first_piece, out, o_b, o_h, o_n, S, H, K, M,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a block of keys got by all pieces of its list, for all heads that share it, always in the same order."""
    m, z = tl.program_id(0), tl.program_id(1)
    b, g = z // K, z % K
    lane, d = tl.arange(0, BC), tl.arange(0, BD)
    inside = (lane < C)[:, None] & (d < D)[None, :]
    total = tl.zeros([BC, BD], tl.float32)
    for h in range(g * (H // K), (g + 1) * (H // K)):
        block = (b * H + h) * M + m
        begin = tl.load(first_piece + block)
        at = pieces + begin.to(tl.int64) * C * D
        for _ in range(tl.load(first_piece + block + 1) - begin):
            total += tl.load(at + lane[:, None] * D + d[None, :], mask=inside, other=0.0)
            at += C * D
    row = m * C + lane
    save_rows(
        out + b.to(tl.int64) * o_b + g.to(tl.int64) * o_h, row, o_n, (lane < C) & (row < S), total, D, BD, True
    )  # fmt: skip
