"""One query a row: what a step of decoding runs. All keys that it sees at once, in one fused call, without tiles.

`ROW` serves any pattern and any layout: the definition gives the bias of one row, O(S). `LINKED_ROW` is for patterns
made of blocks (BigBird) on a cache whose columns are positions: it reads the linked blocks and the listed global tokens
alone, so that a step costs the same whatever the length of the cache.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.contract import Tokens
from attention_zoo.ops.blocks import BlockPattern
from attention_zoo.ops.dispatch import Kernel
from attention_zoo.ops.pattern_call import PatternCall


def _refuse(call: PatternCall) -> str | None:
    if call.q.shape[2] != 1:
        return "more than one query"
    if torch.is_grad_enabled():
        return "it is for decoding, without gradients"
    if call.global_qkv is not None:
        return "a global query has projections of its own"
    return None


def _run(call: PatternCall) -> Tensor:
    bias = call.pattern.full_bias(call.queries, call.keys)
    # padding sees nothing, but what the kernel makes of it must be finite
    padding = ~call.queries.valid[:, None, :, None]
    return _attend(call.q, call.k, call.v, bias.masked_fill(padding, 0), call.scale).masked_fill_(padding, 0)


ROW = Kernel("row", _run, _refuse, "one query: every key held, in one fused call; no gradients")


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Float[Tensor, "B H 1 D"]:
    """Query heads that share a key head become rows of one query."""
    B, H, _, D = q.shape
    groups = H // k.shape[1]
    q = q.reshape(B, k.shape[1], groups, D)
    if bias is not None:
        if groups > 1:
            bias = bias.expand(-1, H, -1, -1).reshape(len(bias), k.shape[1], groups, -1)
        bias = bias.to(q.dtype).expand(B, -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).reshape(B, H, 1, D)


# --- patterns made of blocks -----------------------------------------------------------------------------------------


def _refuse_linked(call: PatternCall) -> str | None:
    reason = _refuse(call)
    if reason is not None:
        return reason
    if call.columns is None or call.globals is None or not call.columns.steady:
        return "the keys are not held by a state whose columns are consecutive tokens"
    if not call.pattern.causal:
        return "links of a two-sided pattern depend on the whole length"
    # the first block's own tokens see nothing but global keys before them
    if bool((call.queries.is_global & (call.queries.position >= cast(BlockPattern, call.pattern).block)).any()):
        return "a global query sees every key"
    return None


def _run_linked(call: PatternCall) -> Tensor:
    pattern, held = cast(BlockPattern, call.pattern), call.columns
    assert held is not None
    assert call.globals is not None
    here = call.queries.position[:, :, None]  # [B, 1, 1]
    last = held.filled - 1  # the query's own column
    links, weight = _links(pattern, call.queries.position // pattern.block)
    inside = torch.arange(pattern.block, device=links.device)
    column = last - here + (links[..., None] * pattern.block + inside).flatten(2)
    linked = (column >= 0) & (column <= last)
    column = column.clamp(0, last)
    flat, shape = column.flatten(1), column.shape
    linked = linked & held.fields.valid.gather(1, flat).view(shape) & ~held.fields.is_global.gather(1, flat).view(shape)
    bias = weight.repeat_interleave(pattern.block, -1).masked_fill(~linked, -torch.inf)
    # global tokens count once: in their own list
    listed = call.globals[:, None].expand(-1, shape[1], -1)
    bias = torch.cat([bias, bias.new_zeros(listed.shape).masked_fill(listed < 0, -torch.inf)], -1)
    column = torch.cat([column, listed.clamp(min=0)], -1)
    extra = _position_bias(call, column, here - last)
    bias = bias if extra is None else bias + extra
    padding = ~call.queries.valid[..., None]
    bias = bias.masked_fill(padding, 0)
    k, v = (_gather(buffer, column) for buffer in held.buffers)
    return _attend(call.q, k, v, bias[:, :, None], call.scale).masked_fill_(padding[..., None], 0)


_known: WeakKeyDictionary[Any, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()
"""Links of the last rows of blocks asked for: they stay the same for a whole block of steps."""


def _links(pattern: BlockPattern, row: Int[Tensor, "B 1"]) -> tuple[Int[Tensor, "B H m"], Float[Tensor, "B H m"]]:
    known = _known.get(pattern)
    if known is None or not torch.equal(known[0], row):
        links, weight = pattern.links(row, torch.zeros_like(row))
        weight = weight.to(torch.float32)
        known = _known[pattern] = (row, links[:, :, 0], weight[:, :, 0])
    return known[1], known[2]


def _position_bias(call: PatternCall, column: Int[Tensor, "B H n"], shift: Int[Tensor, "B 1 1"]) -> Tensor | None:
    """What the position scheme adds, [B, H, n]; `shift` leads from columns to positions."""
    if call.pattern.position_bias(call.queries.cut(slice(0, 1)), call.queries.cut(slice(0, 1))) is None:
        return None
    B, H, _ = column.shape
    # schemes give all heads of a row the same keys: let each head be a row, and take its own bias
    queries = Tokens(*(field.repeat_interleave(H, 0) for field in call.queries))
    keys = (column + shift).flatten(0, 1)
    like = torch.ones_like(keys, dtype=torch.bool)
    found = call.pattern.position_bias(queries, Tokens(keys, like, ~like, torch.zeros_like(keys), keys))
    assert found is not None
    return found[:, :, 0].unflatten(0, (B, H)).diagonal(dim1=1, dim2=2).transpose(1, 2)


def _gather(buffer: Float[Tensor, "B K room D"], column: Int[Tensor, "B H n"]) -> Float[Tensor, "B H n D"]:
    """Each head's own columns."""
    B, K, room, D = buffer.shape
    H = column.shape[1]
    heads = torch.arange(H, device=column.device) // (H // K)
    first = (torch.arange(B, device=column.device)[:, None] * K + heads) * room
    return buffer.view(-1, D).index_select(0, (first[..., None] + column).flatten()).view(*column.shape, D)


LINKED_ROW = Kernel(
    "linked_row", _run_linked, _refuse_linked, "one query on a cache: its linked blocks and global tokens alone, O(1)"
)
