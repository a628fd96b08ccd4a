"""LSH attention on CUDA: sorted chunks by the kernels of ops/softmax/triton.py, rounds by those of triton_kernels.py.

A chunk of sorted tokens is a block, the chunks of its window are its list, heads are a batch; rows are gathered on
chip, straight from the vectors of all tokens. What follows from the layout alone (lists, the same by key chunk, which
slots are empty) is kept with it; of hashing there is the order alone. Sums are taken in a fixed order.

Letters as in ops/lsh/chunks.py; slots: R rounds of N chunks of C.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.ops.lsh import triton_kernels as kernels
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.softmax import triton as blocks
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.triton import Lists

TOKENS = 32
"""Tokens of a program that puts rounds together."""
NOBODY, NOTHING = -2, -1
"""Labels of slots that hold no query, and no key."""


class _Still(NamedTuple):
    """What follows from the layout alone.

    Fields:
        lists: without rows and times.
        inverse: [slots], which of the sorted tokens of its round a slot holds, M where it is empty.
        slot: [R, M], where the sorted tokens of a round stand.
    """

    lists: Lists
    inverse: Int[Tensor, " slots"]
    slot: Int[Tensor, "R M"]


def _still(plan: HashedPlan) -> _Still:
    layout, order = plan.layout, plan.order
    assert order is not None
    (H, R, M), device, kept = order.shape, order.device, layout.kept
    if (H, plan.causal) not in kept:
        per_round = layout.neighbours.shape[0] // R * layout.chunk
        base = torch.arange(R, device=device)[:, None]
        inverse = torch.full((per_round,), M, device=device)
        inverse[layout.slot] = torch.arange(M, device=device)
        places = torch.where(inverse < M, inverse + base * (M + 1), M).flatten()
        held = (inverse < M).repeat(R)
        links, count, _, _ = Lists.packed(layout.neighbours.masked_fill(~layout.present, -1)[None, None])
        label = torch.zeros(H, R * per_round, dtype=torch.int32, device=device)
        lists = Lists(
            links.expand(H, -1, -1, -1).contiguous(),
            count.expand(H, -1, -1).contiguous(),
            q_time=label,
            q_label=label.masked_fill(~held, NOBODY),
            k_time=label,
            k_label=label.masked_fill(~held, NOTHING),
            block=layout.chunk,
            causal=plan.causal,
            strict=True,
        )
        kept[H, plan.causal] = _Still(lists, places, layout.slot + base * per_round)
    found: _Still = kept[H, plan.causal]
    return found


class _Sorted(NamedTuple):
    """A call's tokens in their slots: the lists, and [H, R, M], the slot of each token in each round."""

    lists: Lists
    slots: Int[Tensor, "H R M"]


def _sorted(plan: HashedPlan) -> _Sorted:
    """Tokens of a document come in the order of time, so that a row's number is its time."""
    assert plan.order is not None
    still, order = _still(plan), plan.order.long()
    _, R, M = order.shape
    rows = F.pad(order, (0, 1)).flatten(1).index_select(1, still.inverse).int()
    slots = order.new_empty(order.shape).scatter_(-1, order, still.slot.expand_as(order))
    lists = replace(still.lists, q_rows=rows, k_rows=rows, q_time=rows, k_time=rows)
    if plan.inside and plan.buckets is not None:
        # numbered through the rounds: buckets of two rounds are never the same
        buckets = plan.buckets + torch.arange(R, device=order.device)[:, None] * (plan.buckets.amax() + 1)
        label = torch.zeros_like(rows).scatter_(1, slots.flatten(1), buckets.flatten(1).int())
        q_label, k_label = (torch.where(x < 0, x, label) for x in (lists.q_label, lists.k_label))
        lists = replace(lists, q_label=q_label, k_label=k_label)
    if plan.asked is not None:
        asks = torch.zeros(M, dtype=torch.bool, device=order.device).index_fill_(0, plan.asked, True)
        label = lists.q_label.masked_fill(~asks[rows.long()], NOBODY)
        wanted = (label >= 0).unflatten(1, (-1, plan.layout.chunk)).any(-1)[:, None]
        return _Sorted(replace(lists, q_label=label, count=lists.count * wanted), slots)
    lists.__dict__["turned"] = still.lists.turned  # it is of the links alone
    return _Sorted(lists, slots)


def hashed_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan) -> Float[Tensor, "m H D"]:
    """As `lsh_attention` of ops/lsh/chunks.py."""
    out: Tensor = _Hashed.apply(q, v, plan.sorted())
    return out if plan.asked is None else out[plan.asked]


class _Hashed(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, v: Tensor, plan: HashedPlan) -> Tensor:
        q, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, v))
        M, H, D = q.shape
        lists, slots = _sorted(plan)
        count = lists.k_label.shape[1]
        rows = q.new_empty(H, 1, count, D, dtype=torch.float32)
        keys = _normalised(q, plan)
        lse = blocks.forward(_batch(q), _batch(keys), _batch(v), lists, scale=plan.scale, out=rows)
        out, total = torch.empty_like(q, memory_format=torch.contiguous_format), lse.new_empty(H, 1, M)
        grid, sizes = _programs(M, H, D)
        kernels.merge_rounds[grid](
            rows, lse, slots, v, out, total, *v.stride()[:2], *out.stride()[:2], M, count, R=slots.shape[1], **sizes
        )
        ctx.save_for_backward(q, v, out, total)
        ctx.plan, ctx.sorted = plan, _Sorted(lists, slots)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, v, out, total), plan, (lists, slots) = saved, ctx.plan, ctx.sorted
        M, H, D = q.shape
        count = lists.k_label.shape[1]
        grad = grad.to(q.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).T[:, None]
        dq_rows, dk_rows, dv_rows = q.new_empty(3, H, 1, count, D, dtype=torch.float32)
        blocks.backward(
            _batch(grad), _batch(q), _batch(_normalised(q, plan)), _batch(v), delta, total, lists, scale=plan.scale,
            dq=dq_rows, dk=dk_rows, dv=dv_rows,
        )  # fmt: skip
        dq, dv = q.new_empty(2, M, H, D)
        grid, sizes = _programs(M, H, D)
        kernels.join_gradients[grid](
            dq_rows, dk_rows, dv_rows, slots, q, grad, total, dq, dv, *q.stride()[:2], *grad.stride()[:2],
            *dq.stride()[:2], M, count, D * plan.epsilon, R=slots.shape[1], **sizes,
        )  # fmt: skip
        return dq, dv, None


def _batch(x: Float[Tensor, "M H D"]) -> Float[Tensor, "H 1 M D"]:
    return x.transpose(0, 1)[:, None]


def _normalised(q: Tensor, plan: HashedPlan) -> Tensor:
    M, H, D = q.shape
    keys = torch.empty_like(q, memory_format=torch.contiguous_format)
    grid, sizes = _programs(M, H, D)
    kernels.normalise[grid](q, keys, *q.stride()[:2], *keys.stride()[:2], M, D * plan.epsilon, **sizes)
    return keys


def _programs(M: int, H: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    sizes = {"D": D, "BD": max(16, triton.next_power_of_2(D)), "T": TOKENS, "num_warps": 4, "num_stages": 1}
    return (triton.cdiv(M, TOKENS), H), sizes
