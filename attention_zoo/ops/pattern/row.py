"""One query a row: what a step of decoding runs. All keys that it sees at once, in one fused call, without tiles.

`ROW` serves any pattern and any layout: the definition gives the bias of one row, O(S). `LINKED_ROW` is for patterns
made of blocks (BigBird) on a cache whose columns are positions: it reads the linked blocks and the listed global tokens
alone, so that a step costs the same whatever the length of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.ledger import Ledger
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.first import turned_bias
from attention_zoo.ops.softmax.dense import dense
from attention_zoo.tokens import Tokens


def _run(call: PatternCall) -> Tensor:
    if call.pattern.reach.weights == "uniform" and not call.has_position_bias:
        # the reach is all there is to know: layers that reach alike share the bias
        key = ("row", call.pattern.reach, call.pattern.causal, id(call.queries))
        bias = call.keys.plan(key, lambda: (_bias(call), call.queries))[0]
    else:
        bias = _bias(call)
    if call.turned is not None:
        bias = bias + turned_bias(call)
    return _blanked(call, _attend(call.q, call.k, call.v, bias, call.scale, call.sink))


def _bias(call: PatternCall) -> Tensor:
    """[B|1, H|1, 1, S]. Padding sees nothing, but what the kernel makes of it must be finite."""
    bias = call.pattern.full_bias(call.queries, call.keys)
    return bias if call.queries.dense else bias.masked_fill(~call.queries.valid[:, None, :, None], 0)


def _blanked(call: PatternCall, out: Tensor) -> Tensor:
    return out if call.queries.dense else out.masked_fill_(~call.queries.valid[:, None, :, None], 0)


ROW: Kernel[PatternCall] = Kernel(
    "row",
    _run,
    (facts.one_query, facts.no_gradients, facts.every_row, facts.exact_turned),
    "one query: every key held, in one fused call; no gradients",
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, sink: Float[Tensor, " H"] | None
) -> Float[Tensor, "B H 1 D"]:
    """Query heads that share a key head become rows of one query."""
    B, H, _, D = q.shape
    groups = H // k.shape[1]
    q = q.reshape(B, k.shape[1], groups, D)
    if bias is not None:
        if groups > 1:
            bias = bias.expand(-1, H, -1, -1).reshape(len(bias), k.shape[1], groups, -1)
        bias = bias.to(q.dtype).expand(B, -1, -1, -1)
    if sink is not None:
        return dense(q, k, v, bias, scale=scale, sink=sink.view(-1, groups)).reshape(B, H, 1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).reshape(B, H, 1, D)


# --- patterns made of blocks -----------------------------------------------------------------------------------------


def _held_in_order(call: PatternCall) -> str | None:
    held = call.columns
    # fields of its own: what was concatenated is not known to be in order
    if held is not None and held.ledger.own and held.ledger.steady:
        return None
    return "the keys are not held by a state whose columns are consecutive tokens"


def _sees_links(call: PatternCall) -> str | None:
    # the first block's own tokens see nothing but global keys before them
    queries = call.queries.host
    late = queries.is_global & (queries.position >= call.blocks.size)
    return "a global query sees every key" if bool(late.any()) else None


def _run_linked(call: PatternCall) -> Tensor:
    held, size = call.columns, call.blocks.size
    assert held is not None
    position = call.queries.host.position
    last = held.filled - 1  # the query's own column
    links, weight = _links(call, position // size)
    listed = listed_globals(held.ledger)
    here = call.queries.position[:, :, None]  # [B, 1, 1]
    column = (links + (last - here)[..., None]).flatten(2)
    linked = (column >= 0) & (column <= last)
    column = column.clamp(0, last)
    fields = held.ledger.fields
    if not (call.keys.dense and not call.keys.any_global):
        flat, shape = column.flatten(1), column.shape
        linked = linked & fields.valid.gather(1, flat).view(shape) & ~fields.is_global.gather(1, flat).view(shape)
    bias = weight.masked_fill(~linked, -torch.inf)
    if listed.shape[1]:
        # global tokens count once: in their own list
        mine = listed[:, None].expand(-1, column.shape[1], -1)
        bias = torch.cat([bias, bias.new_zeros(mine.shape).masked_fill(mine < 0, -torch.inf)], -1)
        column = torch.cat([column, mine.clamp(min=0)], -1)
    if call.has_position_bias:
        bias = bias + _position_bias(call, column, here - last)
    if not call.queries.dense:
        bias = bias.masked_fill(~call.queries.valid[..., None], 0)
    k, v = _gathered(held.buffers, column)
    return _blanked(call, _attend(call.q, k, v, bias[:, :, None], call.scale, call.sink))


def _links(call: PatternCall, row: Int[np.ndarray, "B 1"]) -> tuple[Int[Tensor, "B H m s"], Float[Tensor, "B H n"]]:
    """Positions of the tokens of all blocks that these rows are linked to, and weights: the same for many steps."""
    # of the last rows alone: they are as large as what a step reads
    known: dict[bytes, tuple[Tensor, Tensor]] = call.blocks.kept(("row", call.q.device), dict)
    found = known.get(row.tobytes())
    if found is None:
        size = call.blocks.size
        links, weight = (x[:, :, 0].to(call.q.device) for x in call.blocks.lists(row, np.zeros_like(row)))
        position = links[..., None] * size + torch.arange(size, device=links.device)
        found = position, weight.to(torch.float32).repeat_interleave(size, -1)
        known.clear()
        known[row.tobytes()] = found
    return found


def listed_globals(ledger: Ledger) -> Int[Tensor, "B g"]:
    """Columns of the global tokens held, the latest first; -1 where a row has fewer. Found again where some came."""
    fields, filled = ledger.fields, ledger.filled
    known: tuple[int, Tensor] | None = fields.__dict__.get("_listed")
    if known is not None and known[0] <= filled:
        new = ledger.host.cut(slice(known[0], filled))
        if not bool((new.is_global & new.valid).any()):
            fields.__dict__["_listed"] = filled, known[1]
            return known[1]
    host = ledger.host
    mask = host.is_global & host.valid
    most = int(mask.sum(1).max(initial=0))
    column = -np.sort(-np.where(mask, np.arange(filled), -1), axis=1)[:, :most]
    fields.__dict__["_listed"] = filled, tensor_of(column, fields.valid.device)
    return fields.__dict__["_listed"][1]


def _position_bias(call: PatternCall, column: Int[Tensor, "B H n"], shift: Int[Tensor, "B 1 1"]) -> Tensor:
    """What the position scheme adds, [B, H, n]; `shift` leads from columns to positions."""
    B, H, _ = column.shape
    # schemes give all heads of a row the same keys: let each head be a row, and take its own bias
    queries = Tokens(*(field.repeat_interleave(H, 0) for field in call.queries))
    keys = (column + shift).flatten(0, 1)
    like = torch.ones_like(keys, dtype=torch.bool)
    found = call.pattern.position_bias(queries, Tokens(keys, like, ~like, torch.zeros_like(keys), keys))
    assert found is not None
    return found[:, :, 0].unflatten(0, (B, H)).diagonal(dim1=1, dim2=2).transpose(1, 2)


def _gathered(buffers: Sequence[Float[Tensor, "B K room D"]], column: Int[Tensor, "B H n"]) -> Iterator[Tensor]:
    """Each head's own columns of each buffer, [B, H, n, D]."""
    B, K, room, D = buffers[0].shape
    group, device = column.shape[1] // K, column.device
    first = torch.arange(0, B * K * room, room, device=device).view(B, K, 1).expand(-1, -1, group).reshape(B, -1, 1)
    index = (first + column).flatten()
    return (buffer.view(-1, D).index_select(0, index).view(*column.shape, D) for buffer in buffers)


LINKED_ROW: Kernel[PatternCall] = Kernel(
    "linked_row",
    _run_linked,
    (facts.one_query, facts.no_gradients, facts.every_row, _held_in_order, facts.causal, _sees_links),
    "one query on a cache: its linked blocks and global tokens alone, O(1)",
    (facts.is_blocks,),
)
