"""Block-recurrent attention on a sequence that several processes own: nothing but the state waits for its turn.

    keys in reach    of the window, and the tokens of a block that a cut divides: from their owners, all at once
    window           attended to before the state is here
    state            from the process before, through the own blocks, to the process behind
    hidden           what tokens see of the state, and all that follows: after it was handed on

So a layer takes N processes one recurrence over all blocks, and all else once. Backward is the same the other way: what
tokens saw of the state first, then the state's gradient comes, goes through the own blocks and on, and the window's
gradients follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Output
from attention_zoo.layout.blocks import Turns, turns
from attention_zoo.layout.halo import Halo, held_before
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns
from attention_zoo.layout.placement import alone
from attention_zoo.ops.exchange.columns import Pending, start
from attention_zoo.ops.exchange.halo import route_of
from attention_zoo.ops.hand_over.pipeline import neighbours, received, sent
from attention_zoo.ops.pattern.one_of import attend_to_one_of
from attention_zoo.ops.softmax.function import zeros_for


class Handed(NamedTuple):
    """What goes from process to process: the state that the next token of each row's document sees."""

    vectors: Float[Tensor, "B S E"]


def output_in_place(layer: Any, x: Float[Tensor, "B L E"], layout: Layout) -> Output:
    """A call on a shard.

    Args:
        layer: a `BlockRecurrent`.
        x: hidden states of this process's own columns, zeros at padding.
        layout: with a placement.

    Raises:
        Unsupported: where columns are not in the order of processes, in one run each.
    """
    local, own, placement = layer.local, alone(layout), layout.placement
    held = held_before(layout, layer.window)
    keys = held.keys if held.width else own
    new = local.own(x, own)
    pending = _sent(new, layout, held)
    q, far_q = local.heads_of(local.to_q(x)), local.heads_of(layer.to_q_of_state(x))
    columns = Columns.of(keys, *_with(new, pending))
    near = local.seen(q, own, columns)
    order = layout.plan(("turns in place", layer.window), lambda: _turns(layer, own, keys, held))
    before, after, count = neighbours(placement, x.device)
    handed = Handed(layer.initial_state(len(x)).vectors)
    if before is not None:
        far_q, handed = received(far_q, handed, before, count)
    vectors, k, v = layer.gone_through(order, columns, handed.vectors)
    if after is not None:
        assert vectors is not None
        handed = Handed(vectors.index_select(0, tensor_of(order.last, x.device)))
        far_q = sent(far_q, handed, after, count)
    if x.shape[1]:
        far = attend_to_one_of(far_q, k, v, order.which, block=layer.window, scale=layer.scale, asked=own.asked)
    else:  # nobody asks: what came and went gets its gradients all the same
        far = zeros_for(far_q, (far_q, k, *columns.held))
    both = torch.cat([part.transpose(1, 2).flatten(2) for part in (near, far)], -1)
    return Output(layer.to_out(both))


def _sent(new: tuple[Tensor, ...], layout: Layout, held: Halo) -> Pending | None:
    """Keys and values under way to those behind; None: nobody needs any."""
    if not any(map(len, held.needs)):
        return None
    both = torch.cat(new, -1)  # [B, K, L, 2 or 3 · D]
    return start(both.transpose(1, 2).flatten(2), route_of(layout, held, both.device).route, "keys")


def _with(new: tuple[Tensor, ...], pending: Pending | None) -> tuple[Tensor, ...]:
    """Those that come, and the own ones behind them."""
    if pending is None:
        return new
    K, D = new[0].shape[1], new[0].shape[3]
    came = pending.wait().unflatten(2, (K, len(new) * D)).transpose(1, 2)
    return tuple(torch.cat(pair, 2) for pair in zip(came.split(D, -1), new, strict=True))


def _turns(layer: Any, own: Layout, keys: Layout, held: Halo) -> Turns:
    return turns(own, keys, keys.host.cut(slice(0, held.width)), layer.window, keeps=True)
