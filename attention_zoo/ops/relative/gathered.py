"""Relative attention segment by segment on Triton's kernels: each segment's keys are gathered into columns of its own.

    softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{c(i) - c(j)}]) V        c: columns of the segment's own table of keys

What ops/relative/segments.py computes, in few operators for a device that waits for the host: a piece (some queries of
one segment, and the keys that they see, the last query's own in the last column) is a sequence of the kernels that run
ops/relative/triton.py, filled up to the longest one of its lot; no score leaves the chip. Lots bound what is gathered
at once: as much memory for any length, beside the inputs, the output and their gradients.

Gradients of keys go to two streams, as in chunks.py: those of all pairs, summed in a fixed order in float32, and those
of the query's own segment, where every key stands once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

NUMBERS = 1 << 25
"""Numbers of keys that are gathered at once, about."""
PROGRAMS = 65_535
"""Pieces times heads of one launch, at most: what CUDA lets the second axis of a grid count."""


class Lot(NamedTuple):
    """Pieces that run together, n of them.

    Fields:
        rows: [n, R], the queries, as rows of [B · L]; where a piece has fewer, its last one stands before them.
        places: [n, R], where their results go: their rows, or behind the last row where there is none.
        keys: [n, W], the keys, as rows of [B · T]; where a piece has fewer, its last one stands before them.
        starts: the `Starts` of ops/relative/triton.py, which say where each piece's keys and its own segment's begin.
        own: how many of the last columns are in the queries' own segment, at most.
        own_places: [n, own], where the gradients of these go: their rows, or behind the last one where they are none.
    """

    rows: Int[Tensor, "n R"]
    places: Int[Tensor, "n R"]
    keys: Int[Tensor, "n W"]
    starts: Any
    own: int
    own_places: Int[Tensor, "n own"]

    def queries(self, x: Float[Tensor, "BL H D"]) -> Float[Tensor, "n H R D"]:
        return x[self.rows].transpose(1, 2)

    def keys_and_values(self, x: Float[Tensor, "BT 2 H D"]) -> tuple[Tensor, Tensor]:
        """[n, H, W, D] each."""
        keys, values = x[self.keys].permute(2, 0, 3, 1, 4).unbind()
        return keys, values


class LotPlan(NamedTuple):
    """A call's pieces, each query in one of them at most.

    Fields:
        lots: what runs together.
        distances: how many distances, from 0 on, the table of distance keys must hold.
        whole: whether every row of [B · L] is a query.
    """

    lots: tuple[Lot, ...]
    distances: int
    whole: bool


def gathered_attention(
    q: Float[Tensor, "B L H D"],
    kv: Float[Tensor, "B T 2 H D"],
    kv_own: Float[Tensor, "B T 2 H D"],
    r: Float[Tensor, "n H D"],
    u: Float[Tensor, "H D"],
    w: Float[Tensor, "H D"],
    plan: LotPlan,
    *,
    scale: float,
) -> Float[Tensor, "B L H D"]:
    """What each query attends to under the plan; zeros where a row is no query.

    Args:
        kv: keys and values beside each other; receive the gradients of all pairs.
        kv_own: the same numbers; receive the gradients of the pairs inside the query's own segment.
        r: keys of the distances 0, 1, ..., plan.distances - 1.
        u, w: added to the queries before they meet keys and distances.
        scale: factor on both terms.
    """
    flat = (x.flatten(0, 1) for x in (q, kv, kv_own))
    out: Tensor = _Gathered.apply(*flat, r, u, w, plan, scale)
    return out.view(q.shape)


class _Gathered(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, kv, kv_own, r, u, w, plan: LotPlan, scale: float) -> Tensor:
        from attention_zoo.ops.relative import triton

        out, table = _behind(q, q.dtype, plan.whole), triton.falling(r, q.dtype)
        statistics = []
        for lot in plan.lots:
            found, lse = triton.attend(
                triton.Read(lot.queries(q), *lot.keys_and_values(kv), table, u, w), lot.starts, scale
            )
            out[lot.places] = found.transpose(1, 2)
            statistics.append(lse)
        out = out[:-1]
        ctx.save_for_backward(q, kv, r, u, w, out, *statistics)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        from attention_zoo.ops.relative import triton

        q, kv, r, u, w, out, *statistics = saved
        plan, table, wants_own = ctx.plan, triton.falling(r, q.dtype), ctx.needs_input_grad[2]
        dq, dkv = _behind(q, q.dtype, plan.whole), torch.zeros_like(kv, dtype=torch.float32)
        own = _behind(kv, kv.dtype, False) if wants_own else None
        dr: Any = None  # sums over lots
        duw: Any = None
        for lot, lse in zip(plan.lots, statistics):
            keys, values = lot.keys_and_values(kv)
            read = triton.Read(lot.queries(q), keys, values, table, u, w)
            asked, dkeys, for_r, for_uw = triton.gradients(
                read, lot.queries(out), lse, lot.queries(grad), starts=lot.starts, scale=ctx.scale
            )
            dq[lot.places] = asked.transpose(1, 2)
            # by pieces and columns: [2 streams, n, W, 2, H, D]
            of_all, of_own = dkeys.unflatten(0, (2, 2)).permute(0, 2, 3, 1, 4, 5).unbind()
            dkv.index_put_((lot.keys,), of_all.float(), accumulate=True)
            if own is not None:
                own[lot.own_places] = of_own[:, -lot.own :]
            dr, duw = (for_r, for_uw) if dr is None else (dr + for_r, duw + for_uw)
        dr, duw = (torch.zeros_like(r), u.new_zeros(2, *u.shape)) if dr is None else (dr, duw)
        du, dw = duw.to(u.dtype).unbind()
        return dq[:-1], dkv.to(kv.dtype), None if own is None else own[:-1], dr.to(r.dtype), du, dw, None, None


def _behind(like: Tensor, dtype: torch.dtype, whole: bool) -> Tensor:
    """A row more than this one has, for what nobody asked for; zeros where not all others are written."""
    made = like.new_empty(len(like) + 1, *like.shape[1:], dtype=dtype)
    return made if whole else made.zero_()
