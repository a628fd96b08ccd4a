"""Triton kernels: blocks of queries, each against a list of key blocks of its own; forward and backward.

The path of BigBird (blocks of neighbouring columns) and of LSH attention (chunks of sorted tokens) on CUDA. A program
takes one query block and one head, walks its list and keeps a running softmax (Dao et al. 2022, FlashAttention), so
that nothing but output and log-sum-exp is written. Backward recomputes: dq walks the same lists; dk and dv walk the
lists turned round, cut into `PIECE` entries a program, so that a block that everybody sees (a global one) is no
bottleneck, and summed without atomics. O(L·list·block) time, O(L·D) memory.

Tokens are counted in *slots*: block n holds the slots n·C ... n·C + C - 1, and a slot holds a token or is empty.
Whether a pair is seen is decided by two integers a slot: equal labels (document, bucket; negative: empty), and time.

Sums and softmax are float32; products take the tensors' own type, exact ("ieee") for float32.

Letters: B batch, H heads, K key heads, N query blocks, M key blocks, C slots in a block, W entries of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

PIECE = 32
"""Entries of a turned list in one program of the backward."""
WIDEST_BLOCK, WIDEST_HEAD = 128, 256


@dataclass(frozen=True)
class Lists:
    """Who sees whom.

    Fields:
        links: key blocks of each query block, in front; what follows the first `count` is not read.
        count: entries of each list.
        q_time, q_label, k_time, k_label: of the slots; a pair is seen only where labels are equal. Empty slots have a
            negative label, another one in queries than in keys.
        q_rows, k_rows: row of q, and of k and v, that each slot holds; None: slot s holds row s - first_slot of q and
            row s of k and v.
        block: C.
        causal: whether times of keys must not be later than the query's.
        strict: whether they must also differ from it.
        weight: added to the scores of a link; None: nothing.
        first_slot: see q_rows.
    """

    links: Int[Tensor, "B H N W"]
    count: Int[Tensor, "B H N"]
    q_time: Int[Tensor, "B NC"]
    q_label: Int[Tensor, "B NC"]
    k_time: Int[Tensor, "B MC"]
    k_label: Int[Tensor, "B MC"]
    block: int
    causal: bool
    strict: bool
    q_rows: Int[Tensor, "B NC"] | None = None
    k_rows: Int[Tensor, "B MC"] | None = None
    weight: Float[Tensor, "B H N W"] | None = None
    first_slot: int = 0

    @staticmethod
    def packed(links: Int[Tensor, "B H N W"], weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """links with the entries that are at least 0 in front, their number, and the weights in the same order."""
        order = (links < 0).byte().argsort(dim=-1, stable=True)
        count = (links >= 0).sum(-1, dtype=torch.int32)
        return links.gather(-1, order).int(), count, None if weight is None else weight.gather(-1, order).float()


def refuse(block: int, head_width: int, dtype: torch.dtype) -> str | None:
    """Why operands of this shape and type cannot run, or None."""
    if block > WIDEST_BLOCK:
        return f"blocks of {block} do not fit on chip, at most {WIDEST_BLOCK} do"
    if head_width > WIDEST_HEAD:
        return f"heads of width {head_width} do not fit on chip, at most {WIDEST_HEAD} do"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its products are not exact in {dtype}".replace("torch.", "")
    return None


# --- kernels ---------------------------------------------------------------------------------------------------------


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
    seen = q_label[:, None] == k_label[None, :]
    if CAUSAL:
        if STRICT:  # noqa: SIM108
            seen = seen & (k_time[None, :] < q_time[:, None])
        else:
            seen = seen & (k_time[None, :] <= q_time[:, None])
    elif STRICT:
        seen = seen & (k_time[None, :] != q_time[:, None])
    return seen


@triton.jit
def _gather(at, row, stride, ok, D: tl.constexpr, BD: tl.constexpr):
    """[rows, D] of a matrix; zeros where not ok."""
    d = tl.arange(0, BD)
    return tl.load(at + row[:, None].to(tl.int64) * stride + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _forward(
    q, k, v, out, lse, links, count, weight, q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, l_b, l_h, q_slots, k_slots,
    N, W, H, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    g = h // groups
    row, time, label = _slots(
        q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots, n, first, C, BC, HAS_ROWS
    )
    asks = label >= 0
    queries = _gather(q + b * q_b + h * q_h, row, q_n, asks, D, BD)
    at = z * N + n
    top = tl.full([BC], -float("inf"), tl.float32)
    total = tl.zeros([BC], tl.float32)
    mixed = tl.zeros([BC, BD], tl.float32)
    for entry in range(tl.load(count + at)):
        other = tl.load(links + at * W + entry)
        k_row, k_when, k_name = _slots(
            k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots, other, 0, C, BC, HAS_ROWS
        )
        keys = _gather(k + b * k_b + g * k_h, k_row, k_n, k_name >= 0, D, BD)
        values = _gather(v + b * v_b + g * v_h, k_row, v_n, k_name >= 0, D, BD)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if HAS_WEIGHT:
            scores += tl.load(weight + at * W + entry)
        scores = tl.where(_seen(time, label, k_when, k_name, CAUSAL, STRICT), scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        shrink = tl.exp(top - anchor)
        weights = tl.exp(scores - anchor[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = higher
    some = total > 0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    found = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), -float("inf"))
    if HAS_ROWS:
        row = n * C + tl.arange(0, BC)  # results of gathered rows stay in slots: a row may stand in several
        asks = tl.arange(0, BC) < C
    d = tl.arange(0, BD)
    tl.store(
        out + b * o_b + h * o_h + row[:, None].to(tl.int64) * o_n + d[None, :],
        mixed.to(out.dtype.element_ty),
        mask=asks[:, None] & (d < D)[None, :],
    )
    tl.store(lse + b * l_b + h * l_h + row, found, mask=asks)


@triton.jit
def _backward_q(
    q, k, v, grad, delta, lse, dq, links, count, weight, q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, o_b, o_h, o_n, l_b, l_h, q_slots, k_slots,
    N, W, H, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    n, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // H, z % H
    g = h // groups
    row, time, label = _slots(
        q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots, n, first, C, BC, HAS_ROWS
    )
    asks = label >= 0
    queries = _gather(q + b * q_b + h * q_h, row, q_n, asks, D, BD)
    grads = _gather(grad + b * g_b + h * g_h, row, g_n, asks, D, BD)
    base = tl.load(lse + b * l_b + h * l_h + row, mask=asks, other=float("inf"))
    shift = tl.load(delta + b * l_b + h * l_h + row, mask=asks, other=0.0)
    at = z * N + n
    total = tl.zeros([BC, BD], tl.float32)
    for entry in range(tl.load(count + at)):
        other = tl.load(links + at * W + entry)
        k_row, k_when, k_name = _slots(
            k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots, other, 0, C, BC, HAS_ROWS
        )
        keys = _gather(k + b * k_b + g * k_h, k_row, k_n, k_name >= 0, D, BD)
        values = _gather(v + b * v_b + g * v_h, k_row, v_n, k_name >= 0, D, BD)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if HAS_WEIGHT:
            scores += tl.load(weight + at * W + entry)
        seen = _seen(time, label, k_when, k_name, CAUSAL, STRICT)
        weights = tl.where(seen, tl.exp(scores - base[:, None]), 0.0)
        dweights = tl.dot(grads, tl.trans(values), input_precision="ieee")
        dscores = weights * (dweights - shift[:, None])
        total += tl.dot(dscores.to(keys.dtype), keys, input_precision="ieee")
    if HAS_ROWS:
        row = n * C + tl.arange(0, BC)
        asks = tl.arange(0, BC) < C
    d = tl.arange(0, BD)
    tl.store(
        dq + b * o_b + h * o_h + row[:, None].to(tl.int64) * o_n + d[None, :],
        (total * scale).to(dq.dtype.element_ty),
        mask=asks[:, None] & (d < D)[None, :],
    )


@triton.jit
def _backward_kv(
    q, k, v, grad, delta, lse, dk, dv, entries, piece_block, piece_start, piece_stop, weight,
    q_rows, q_time, q_label, k_rows, k_time, k_label,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, l_b, l_h, q_slots, k_slots,
    N, W, H, M, groups, first, scale,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    block = tl.load(piece_block + piece).to(tl.int64)
    z = block // M
    b, h = z // H, z % H
    g = h // groups
    k_row, k_when, k_name = _slots(
        k_rows + b * k_slots, k_time + b * k_slots, k_label + b * k_slots, block % M, 0, C, BC, HAS_ROWS
    )
    keys = _gather(k + b * k_b + g * k_h, k_row, k_n, k_name >= 0, D, BD)
    values = _gather(v + b * v_b + g * v_h, k_row, v_n, k_name >= 0, D, BD)
    for_keys = tl.zeros([BC, BD], tl.float32)
    for_values = tl.zeros([BC, BD], tl.float32)
    for at in range(tl.load(piece_start + piece), tl.load(piece_stop + piece)):
        entry = tl.load(entries + at).to(tl.int64)
        row, time, label = _slots(
            q_rows + b * q_slots, q_time + b * q_slots, q_label + b * q_slots, (entry // W) % N, first, C, BC, HAS_ROWS
        )
        asks = label >= 0
        queries = _gather(q + b * q_b + h * q_h, row, q_n, asks, D, BD)
        grads = _gather(grad + b * g_b + h * g_h, row, g_n, asks, D, BD)
        base = tl.load(lse + b * l_b + h * l_h + row, mask=asks, other=float("inf"))
        shift = tl.load(delta + b * l_b + h * l_h + row, mask=asks, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if HAS_WEIGHT:
            scores += tl.load(weight + entry)
        seen = _seen(time, label, k_when, k_name, CAUSAL, STRICT)
        weights = tl.where(seen, tl.exp(scores - base[:, None]), 0.0)
        for_values += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision="ieee")
        dweights = tl.dot(grads, tl.trans(values), input_precision="ieee")
        dscores = weights * (dweights - shift[:, None])
        for_keys += tl.dot(tl.trans(dscores.to(queries.dtype)), queries, input_precision="ieee")
    lane, d = tl.arange(0, BC), tl.arange(0, BD)
    where = (piece * C + lane[:, None]) * D + d[None, :]
    inside = (lane < C)[:, None] & (d < D)[None, :]
    tl.store(dk + where, for_keys * scale, mask=inside)
    tl.store(dv + where, for_values, mask=inside)


# --- launching them --------------------------------------------------------------------------------------------------


def forward(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    lists: Lists,
    *,
    scale: float,
    out: Float[Tensor, "B H n D"],
) -> Float[Tensor, "B H n"]:
    """Write the attention of every query (every slot, where rows are gathered) to `out`.

    Queries in no slot are left as they are in `out`.

    Returns:
        The log-sum-exp, -inf where nothing is seen.
    """
    q, k, v = map(_rows_last, (q, k, v))
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    grid = (lists.links.shape[2], q.shape[0] * q.shape[1])
    _forward[grid](
        q, k, v, out, lse, *_tables(lists), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *lse.stride()[:2], *_sizes(q, k, lists), scale, **_meta(q, lists),
    )  # fmt: skip
    return lse


def backward(
    grad: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    delta: Float[Tensor, "B H L"],
    lse: Float[Tensor, "B H L"],
    lists: Lists,
    *,
    scale: float,
    dq: Float[Tensor, "B H n D"],
) -> tuple[Float[Tensor, "B K MC D"], Float[Tensor, "B K MC D"]]:
    """Write the gradient of every query (every slot, where rows are gathered) to `dq`.

    Args:
        grad, delta, lse: of the rows of q: of the output, its product with the output summed over D, and the (merged)
            log-sum-exp.

    Returns:
        dk and dv of the slots of keys, float32.
    """
    q, k, v, grad = map(_rows_last, (q, k, v, grad))
    # +inf makes all weights of a row that sees nothing zero
    lse = torch.where(lse == -torch.inf, torch.inf, lse).contiguous()
    delta = delta.float().contiguous()
    (B, H, _, D), K, C = q.shape, k.shape[1], lists.block
    N, M = lists.links.shape[2], lists.k_label.shape[1] // C
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    _backward_q[(N, B * H)](
        q, k, v, grad, delta, lse, dq, *_tables(lists), *strides, *dq.stride()[:3], *lse.stride()[:2],
        *_sizes(q, k, lists), scale, **_meta(q, lists),
    )  # fmt: skip
    entries, block, start, stop = _turned(lists, M)
    dk, dv = (torch.empty(len(block), C * D, device=q.device) for _ in range(2))
    _, _, *tables = _tables(lists)
    *slots, _, W, _, groups, first = _sizes(q, k, lists)
    _backward_kv[(len(block),)](
        q, k, v, grad, delta, lse, dk, dv, entries, block, start, stop, *tables, *strides, *lse.stride()[:2],
        *slots, N, W, H, M, groups, first, scale, **_meta(q, lists),
    )  # fmt: skip
    # pieces of one block, and heads that share their keys, add up
    z = block.long() // M
    target = (z // H * K + z % H // (H // K)) * M + block % M
    return tuple(x.new_zeros(B * K * M, C * D).index_add_(0, target, x).view(B, K, M * C, D) for x in (dk, dv))  # type: ignore[return-value]


def _rows_last(x: Tensor) -> Tensor:
    """The kernels step by one from channel to channel."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(lists: Lists) -> tuple[Tensor, ...]:
    """Pointers in the order of the kernels; what is missing is never read."""
    none = lists.links
    q_rows, k_rows = (none if rows is None else rows.contiguous() for rows in (lists.q_rows, lists.k_rows))
    weight = none if lists.weight is None else lists.weight.contiguous()
    slots = (x.contiguous() for x in (lists.q_time, lists.q_label, lists.k_time, lists.k_label))
    q_time, q_label, k_time, k_label = slots
    return lists.links.contiguous(), lists.count.contiguous(), weight, q_rows, q_time, q_label, k_rows, k_time, k_label


def _sizes(q: Tensor, k: Tensor, lists: Lists) -> tuple[int, ...]:
    N, W = lists.links.shape[2:]
    slots = (lists.q_label.shape[1], lists.k_label.shape[1])
    return (*slots, N, W, q.shape[1], q.shape[1] // k.shape[1], lists.first_slot)


def _meta(q: Tensor, lists: Lists) -> dict[str, Any]:
    C, D = lists.block, q.shape[-1]
    BC, BD = (max(16, triton.next_power_of_2(n)) for n in (C, D))
    return {
        "C": C, "D": D, "BC": BC, "BD": BD, "CAUSAL": lists.causal, "STRICT": lists.strict,
        "HAS_ROWS": lists.q_rows is not None, "HAS_WEIGHT": lists.weight is not None,
        "num_warps": 8 if BC * BD > 8192 else 4, "num_stages": 2,
    }  # fmt: skip


def _turned(lists: Lists, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists by key block: flat entries, and for each piece its (batch, head, key block), first and last entry.

    Without waiting for the device: there are at least as many pieces as needed, the rest are empty.
    """
    B, H, _, W = lists.links.shape
    device = lists.links.device
    listed = torch.arange(W, device=device) < lists.count[..., None]
    owner = torch.arange(B * H, device=device).view(B, H, 1, 1)
    key = torch.where(listed, owner * M + lists.links, B * H * M).flatten()
    entries = key.argsort(stable=True)
    count = torch.zeros(B * H * M + 1, dtype=torch.long, device=device).scatter_add_(0, key, torch.ones_like(key))
    count = count[:-1]
    begin = count.cumsum(0) - count
    pieces = ((count + PIECE - 1) // PIECE).clamp(min=1)  # at least one, which writes the zeros
    before = pieces.cumsum(0)
    piece = torch.arange(B * H * M + key.numel() // PIECE, device=device)
    block = torch.searchsorted(before, piece, right=True).clamp(max=B * H * M - 1)
    start = begin[block] + (piece - (before - pieces)[block]) * PIECE
    stop = torch.minimum(start + PIECE, (begin + count)[block])
    return entries.int(), block.int(), start.int(), torch.maximum(start, stop).int()


def block_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    lists: Lists,
    *,
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """Attention along the lists, differentiable; zeros where a query sees nothing. S is M·C, rows are not gathered."""
    out: Tensor = _Blocks.apply(q, k, v, lists, scale)
    return out


class _Blocks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float) -> Tensor:
        B, H, L, D = q.shape
        out = q.new_zeros(B, L, H, D).transpose(1, 2)  # as the next projection reads it
        lse = forward(q, k, v, lists, scale=scale, out=out)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists, ctx.scale = lists, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = saved
        delta = (grad.float() * out.float()).sum(-1)
        dq = torch.zeros_like(q)
        dk, dv = backward(grad.to(q.dtype), q, k, v, delta, lse, ctx.lists, scale=ctx.scale, dq=dq)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
