"""Patterns made of blocks on CUDA: one Triton kernel walks the list of key blocks of each query block.

The lists are made on the host, once for a layout and pattern, and so are the same by key block, for the backward; calls
whose tokens are implied by their shape keep them from call to call. Global keys are copied behind the others, into
blocks that all are linked to; in their own blocks nobody sees them, so that each counts once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.grid import with_taken
from attention_zoo.layout.host import Array, array_of, tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.blocks import Laid, fills_blocks, with_whole_rows
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.globals import with_global_rows

NOBODY, NOTHING = -2, -1
"""Labels of slots that hold no query, and no key."""


class ListPlan(NamedTuple):
    """What a call of a pattern of blocks is launched with, besides its operands.

    Fields:
        lists: `Lists` of ops/softmax/triton.py.
        columns: which columns are copied behind the others; None: none.
        rows: whether global queries see more than their lists show.
    """

    lists: Any
    columns: Int[Tensor, "B n"] | None
    rows: bool


def _run(call: PatternCall) -> Tensor:
    from attention_zoo.ops.softmax.triton import block_attention

    laid = Laid(call)
    plan = _planned(call, laid)
    moved = laid.with_keys()
    k, v = moved.k, moved.v
    if plan.columns is not None:
        k, v = (with_taken(x, plan.columns) for x in (k, v))
    out = block_attention(moved.q, k, v, plan.lists, scale=moved.scale, sink=moved.sink)
    return laid.back(with_global_rows(moved, out, in_one=True) if plan.rows else out)


def _planned(call: PatternCall, laid: Laid) -> ListPlan:
    keys = call.keys
    if call.queries is keys and keys.dense and keys.starts_at_zero:
        host, shape = keys.host, keys.valid.shape
        key = ("block lists", *shape, host.is_global.tobytes(), host.length.tobytes(), call.q.device)
        return call.blocks.kept(key, lambda: _plan(laid))
    key = ("block lists", call.blocks, id(call.queries))
    # the plan keeps what the key's id is of
    return call.keys.plan(key, lambda: (_plan(laid), call.queries))[0]


def _plan(laid: Laid) -> ListPlan:
    from attention_zoo.ops.softmax.triton import Lists

    call, block = laid.call, laid.block
    keys, queries, device = laid.grid.keys.host, call.queries.host, call.q.device
    B, columns = keys.valid.shape
    k_time = np.broadcast_to(np.arange(columns), (B, columns))
    k_label = np.where(keys.valid & ~keys.is_global, keys.document, NOTHING)
    links, weight = (array_of(x) for x in laid.host)
    links = np.where(weight == -np.inf, -1, links)
    chosen, extra = _global_keys(keys.is_global & keys.valid, block), None
    if chosen is not None:
        index, there = chosen
        extra = tensor_of(index, device)
        k_time = np.concatenate([k_time, index], 1)
        document = np.take_along_axis(keys.document, index, 1)
        k_label = np.concatenate([k_label, np.where(there, document, NOTHING)], 1)
        more = np.arange(columns // block, k_time.shape[1] // block)
        links = np.concatenate([links, np.broadcast_to(more, (*links.shape[:3], len(more)))], 3)
        weight = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, len(more))))
    before, L = laid.first % block, queries.valid.shape[1]
    around = ((0, 0), (before, links.shape[2] * block - before - L))
    q_time = np.pad(k_time[:, laid.first : laid.first + L], around)
    q_label = np.pad(np.where(queries.valid, queries.document, NOBODY), around, constant_values=NOBODY)
    whole = None
    if block >= 16 and not block & (block - 1):  # else a tile has more lanes than slots
        whole = _whole(links, q_time, q_label, k_time, k_label, block, call.pattern.causal)
    weighs = bool((weight[links >= 0] != 0).any())
    given = (np.broadcast_to(x, (B, *links.shape[1:])) for x in (links, weight, links if whole is None else whole))
    at, added, flags = (tensor_of(np.array(x, order="C")) for x in given)
    packed, count, factors, first = Lists.packed(at, added if weighs else None, None if whole is None else flags)

    def slots(x: Array) -> Tensor:
        return tensor_of(np.array(x, np.int32, order="C"), device)

    lists = Lists(
        packed.to(device),
        count.to(device),
        q_time=slots(q_time),
        q_label=slots(q_label),
        k_time=slots(k_time),
        k_label=slots(k_label),
        block=block,
        causal=call.pattern.causal,
        strict=False,
        weight=None if factors is None else factors.to(device),
        first_slot=before,
        whole=None if first is None or not bool(first.any()) else first.to(device),
    )
    return ListPlan(lists, extra, call.any_global_query and _sees_more(call))


def _global_keys(marked: Bool[np.ndarray, "B S"], block: int) -> tuple[Array, Array] | None:
    """Columns of the global keys of each row, filled up to whole blocks, and which of them are none of the fillers."""
    most = int(marked.sum(1).max(initial=0))
    if not most:
        return None
    index = np.argsort(~marked, axis=1, kind="stable")[:, :most]
    there = np.take_along_axis(marked, index, 1)
    fill = ((0, 0), (0, -most % block))
    return np.pad(index, fill), np.pad(there, fill)


def _whole(
    links: Array, q_time: Array, q_label: Array, k_time: Array, k_label: Array, block: int, causal: bool
) -> Bool[np.ndarray, "B H N W"]:
    """Which linked blocks are seen whole, by every query of the block."""

    def ends(x: Array) -> tuple[Array, Array]:
        blocks = x.reshape(len(x), -1, block)
        return blocks.min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = ends(q_label), ends(k_label)
    batch, at = np.arange(len(k_low))[:, None, None, None], links.clip(0)
    mine = q_low[:, None, :, None]
    seen = (links >= 0) & (q_low == q_high)[:, None, :, None] & (k_low[batch, at] == mine) & (k_high[batch, at] == mine)
    if causal:
        seen = seen & (ends(k_time)[1][batch, at] <= ends(q_time)[0][:, None, :, None])
    return np.asarray(seen)


def _sees_more(call: PatternCall) -> bool:
    """Whether a global query sees keys that are not global: causal, the first tokens of a document do not."""
    keys, L = call.keys.host, call.q.shape[2]
    if not call.pattern.causal:
        return True
    plain = keys.valid & ~keys.is_global
    earlier = np.maximum.accumulate(np.where(plain, np.arange(plain.shape[1]), -1), 1)
    same = np.take_along_axis(keys.document, earlier.clip(0), 1) == keys.document
    return bool((keys.is_global & keys.valid & (earlier >= 0) & same)[:, plain.shape[1] - L :].any())


def rows_are_costly(call: PatternCall) -> str | None:
    """Whether global queries are an attention of their own here, of many operators: FlexAttention takes them along."""
    if facts.on_cuda(call) is not None or facts.is_blocks(call.pattern) is not None:
        return "it is no call of blocks on CUDA"
    if call.sink is None and call.starts_at_zero and call.q.shape[1] == call.k.shape[1]:
        return "global queries are one fused call"
    call = with_whole_rows(call)
    return None if call.any_global_query and _sees_more(call) else "global queries see what is listed"


def _takes_blocks(call: PatternCall) -> str | None:
    if facts.has_triton(call):
        return None
    from attention_zoo.ops.softmax.triton import refuse

    return refuse(call.blocks.size, call.q.shape[3], call.q.dtype, call.q.device)


TRITON_BLOCKS: Kernel[PatternCall] = Kernel(
    "triton",
    _run,
    (facts.has_triton, _takes_blocks, facts.no_position_bias, facts.own_keys, fills_blocks),
    "one Triton kernel walks the list of key blocks of each query block",
    (facts.is_blocks,),
)
