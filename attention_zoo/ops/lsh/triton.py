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

from attention_zoo.ops.lsh import triton_kernels as kernels
from attention_zoo.ops.lsh.layout import sort_tokens
from attention_zoo.ops.lsh.plan import HashedPlan
from attention_zoo.ops.softmax import triton as blocks
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.triton import Lists

TOKENS = 32
"""Tokens of a program that puts rounds together."""
NOTHING = -1
"""The label of a slot that holds no key, and none that asks: kernels read nothing there."""


class _Still(NamedTuple):
    """What follows from the layout alone.

    Fields:
        lists: without rows and times.
        inverse: [slots], which of the sorted tokens of all rounds a slot holds, any where it is empty.
        first, times: [slots], label = first + times · bucket: buckets of two rounds differ where they could meet, and a
            slot that is empty is `NOTHING`.
        slot: [R, M], where the sorted tokens of a round stand.
    """

    lists: Lists
    inverse: Int[Tensor, " slots"]
    first: Int[Tensor, " slots"]
    times: Int[Tensor, " slots"]
    slot: Int[Tensor, "R M"]


def _still(plan: HashedPlan) -> _Still:
    layout, buckets = plan.layout, plan.buckets
    assert buckets is not None
    (H, R, M), device, kept = buckets.shape, buckets.device, layout.kept
    if (H, plan.causal) not in kept:
        per_round = layout.neighbours.shape[0] // R * layout.chunk
        base = torch.arange(R, device=device)[:, None]
        inverse = torch.full((per_round,), M, device=device)
        inverse[layout.slot] = torch.arange(M, device=device)
        places = torch.where(inverse < M, inverse + base * M, 0).flatten()
        held = (inverse < M).repeat(R)
        number = base.expand(R, per_round).flatten() if layout.across_rounds else torch.zeros_like(places)
        first = torch.where(held, number, NOTHING).int()
        times = held.int() * (R if layout.across_rounds else 1)
        links, count, _, _ = Lists.packed(layout.neighbours.masked_fill(~layout.present, -1)[None, None])
        label = torch.where(held, 0, NOTHING).int().expand(H, -1).contiguous()
        lists = Lists(
            links.expand(H, -1, -1, -1).contiguous(),
            count.expand(H, -1, -1).contiguous(),
            q_time=label,
            q_label=label,
            k_time=label,
            k_label=label,
            block=layout.chunk,
            causal=plan.causal,
            strict=True,
        )
        kept[H, plan.causal] = _Still(lists, places, first, times, layout.slot + base * per_round)
    found: _Still = kept[H, plan.causal]
    return found


class _Sorted(NamedTuple):
    """A call's tokens in their slots: the lists, and [H, R, M], the slot of each token in each round."""

    lists: Lists
    slots: Int[Tensor, "H R M"]


def _sorted(plan: HashedPlan) -> _Sorted:
    """Tokens of a document come in the order of time, so that a row's number is its time."""
    buckets, still, layout = plan.buckets, _still(plan), plan.layout
    assert buckets is not None
    order = sort_tokens(buckets, layout.document).long()
    M, lists = order.shape[2], still.lists
    slots = order.new_empty(order.shape).scatter_(-1, order, still.slot.expand_as(order))
    if plan.inside:
        both = torch.stack([order, buckets.gather(-1, order)]).flatten(2)
        rows, label = both.index_select(-1, still.inverse).int()
        label = torch.addcmul(still.first, still.times, label)
        lists = replace(lists, q_label=label, k_label=label)
    else:
        rows = order.flatten(1).index_select(1, still.inverse).int()
    lists = replace(lists, q_rows=rows, k_rows=rows, q_time=rows, k_time=rows)
    if plan.asked is not None:
        asks = torch.zeros(M, dtype=torch.bool, device=order.device).index_fill_(0, plan.asked, True)
        label = lists.q_label.masked_fill(~asks[rows.long()], NOTHING)
        wanted = (label >= 0).unflatten(1, (-1, layout.chunk)).any(-1)[:, None]
        return _Sorted(replace(lists, q_label=label, count=lists.count * wanted), slots)
    lists.__dict__["turned"] = still.lists.turned  # it is of the links alone
    return _Sorted(lists, slots)


def hashed_attention(q: Float[Tensor, "M H D"], v: Float[Tensor, "M H D"], plan: HashedPlan) -> Float[Tensor, "m H D"]:
    """As `lsh_attention` of ops/lsh/chunks.py."""
    out: Tensor = _Hashed.apply(q, v, plan)
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
