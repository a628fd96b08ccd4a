"""A pattern on a sequence that several processes own: what its queries need is fetched, and then it runs as ever.

Which columns those are follows from `reach` (layout/needs.py), never from a kernel: a kernel gets the keys that came,
in the order of the sequence, with what they are. Three things travel:

    keys and values   within reach of another's queries, and global ones; sent before the owner projects the rest
    global queries    to all who own keys that they see; the answers go back (ops/exchange/everyone.py)
    a ring            where queries see everything of their document (ops/exchange/ring.py)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.attention.placed_rows import Cuts, cuts_of, in_order
from attention_zoo.contract import Output
from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import needs, needs_everything, seers
from attention_zoo.layout.placement import Placement
from attention_zoo.ops.exchange.columns import Pending, start
from attention_zoo.ops.exchange.everyone import Everyone, everyone_of, with_rows_of_everyone
from attention_zoo.ops.exchange.ring import Ring, ring_attention, ring_of
from attention_zoo.ops.exchange.route import Fetch, Route, fetching
from attention_zoo.ops.exchange.shown import pieces_of
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.first import turned_queries
from attention_zoo.ops.pattern.globals import everyone_bias
from attention_zoo.ops.softmax.pieces import Piece
from attention_zoo.rules import Unsupported

RING_KERNELS = ("auto", "tiles")
EARLY = 0.5
"""Columns that others need are projected by themselves, before all, if they are less than this share of the own ones:
they are projected twice, which has to cost less than waiting for them."""


class _Plan(NamedTuple):
    """What a pattern does on one process; the same for all layers whose reach is the same.

    Fields:
        fetch: the keys that come.
        early: of the own columns those that others need, and what they are; None: they are too many to project them
            first.
        route: of the entries of those columns.
        keys: what the keys are: those that came and the own ones, in the order of the sequence.
        order: how they get into that order; None: they stand in it.
        cuts: which rows need none of what comes; None: too few.
        everyone: how rows are answered that see everything; None: there are none, on any process.
    """

    fetch: Fetch
    early: tuple[Int[Tensor, " n"], Layout] | None
    route: Route
    keys: Layout
    order: Int[Tensor, " S"] | None
    cuts: Cuts | None
    everyone: Everyone | None


def output_in_place(layer: Any, x: Float[Tensor, "B L E"], layout: Layout) -> Output:
    """A call of a pattern on a shard.

    Losses of parameters alone are shares: their sum over all processes is what one has.
    """
    hidden = layer.to_out(answered_in_place(layer, x, layer._marked(layout)).transpose(1, 2).flatten(2))
    return Output(hidden, None, {name: loss / layout.placement.size for name, loss in layer.losses().items()})


def answered_in_place(layer: Any, x: Float[Tensor, "B L E"], layout: Layout) -> Float[Tensor, "B H L D"]:
    """What the queries of a shard see of the whole sequence.

    Args:
        layer: a `PatternAttention`.
        x: hidden states of this process's own columns, zeros at padding.
        layout: marked, with a placement.
    """
    placement: Placement = layout.placement
    whole = layer._marked(placement.whole)
    if needs_everything(layer.reach):
        return _ringed(layer, x, layout, whole)
    plan = _plan(layer, layout, whole)
    # what others wait for goes first
    if plan.early is None:
        k, v = layer._own_keys(x, layout)
        pending = _sent(k, v, plan)
    else:
        some, tokens = plan.early
        k, v = layer._own_keys(x.index_select(1, some), tokens)
        pending = _sent(k, v, plan)
        k, v = layer._own_keys(x, layout)
    q = layer._heads(layer.to_q(x))
    turned = turned_queries(layer.reach, q, layout, layer.scheme.turn)
    q = layer.scheme.turn(q, layout)
    operands = q, k, v
    if plan.everyone is not None and layer.computes_apart:
        operands = layer.global_operands(x, layout)

    def call(keys: tuple[Tensor, Tensor], tokens: Layout) -> PatternCall:
        learned, apart = layer.bias_parameters(), plan.everyone is not None
        return PatternCall(layer, q, *keys, layout, tokens, layer.scale, learned, apart, sink=layer.sink, turned=turned)

    def run(one: PatternCall) -> Tensor:
        return layer._run(one, layer.kernel)

    def all_keys() -> PatternCall:
        return call(_with(k, v, pending, plan), plan.keys)

    if plan.cuts is not None and layer.kernel == "auto":
        return in_order(run, call((k, v), layout), all_keys, plan.cuts)
    out = run(all_keys())
    return out if plan.everyone is None else _with_everyone(layer, out, operands, layout, whole, plan.everyone)


# --- by need ---------------------------------------------------------------------------------------------------------


def _plan(layer: Any, layout: Layout, whole: Layout) -> _Plan:
    reach, heads = layer.reach, (layer.kv_heads, layer.heads)

    def make() -> tuple[_Plan, Layout]:
        placement, device = layout.placement, layout.valid.device
        wanted = needs(
            whole, placement.columns, reach, causal=layer.causal, key_heads=layer.kv_heads, heads=layer.heads
        )
        fetch = fetching(placement, wanted, device)
        own = placement.columns[placement.rank]
        columns = np.concatenate([fetch.columns, own])
        order = None if bool((np.diff(columns) > 0).all()) else np.argsort(columns, kind="stable")
        keys = Placement.chosen(whole, columns if order is None else columns[order])
        see_all = seers(whole, reach)
        everyone = everyone_of(placement, whole, see_all, layer.causal) if bool(see_all.any()) else None
        early, route = _early(fetch, whole, own)
        cuts = cuts_of(whole, own, columns if order is None else columns[order], reach, layer.causal)
        into = None if order is None else tensor_of(order, device)
        return _Plan(fetch, early, route, keys, into, cuts, everyone), whole

    # the plan keeps what the key's id is of
    return layout.plan(("placed", id(whole), reach, layer.causal, *heads), make)[0]


def _early(fetch: Fetch, whole: Layout, own: Int[np.ndarray, " L"]) -> tuple[Any, Route]:
    """Which own columns to project before the others, and the route of those."""
    entries = [some.numpy(force=True) for some in fetch.route.sends]
    count = max(1, len(own))
    some = np.unique(np.concatenate(entries) % count)
    if len(some) > EARLY * len(own):
        return None, fetch.route
    device = whole.valid.device
    again = tuple(
        tensor_of(each // count * len(some) + np.searchsorted(some, each % count), device) for each in entries
    )
    return (tensor_of(some, device), Placement.chosen(whole, own[some])), fetch.route._replace(sends=again)


def _sent(k: Float[Tensor, "B K n D"], v: Float[Tensor, "B K n D"], plan: _Plan) -> Pending:
    """Keys and values under way to those who need them, in one message each."""
    both = torch.cat([k, v], -1)
    by_head = plan.fetch.into is not None
    return start(both.flatten(1, 2) if by_head else both.transpose(1, 2).flatten(2), plan.route, "keys")


def _with(k: Tensor, v: Tensor, pending: Pending, plan: _Plan) -> tuple[Tensor, Tensor]:
    """All keys and values: those that come, and the own ones."""
    came, (B, K, _, D) = pending.wait(), k.shape
    into, n = plan.fetch.into, len(plan.fetch.columns)
    if into is None:
        came = came.unflatten(2, (K, 2 * D)).transpose(1, 2)
    else:
        # of a head that does not need a column it is zero, and nobody sees it
        came = came.new_zeros(B, K * n, 2 * D).index_copy(1, into, came).unflatten(1, (K, n))
    keys, values = (torch.cat(pair, 2) for pair in zip(came.split(D, -1), (k, v), strict=True))
    if plan.order is None:
        return keys, values
    return keys.index_select(2, plan.order), values.index_select(2, plan.order)


def _with_everyone(
    layer: Any, out: Tensor, operands: tuple[Tensor, ...], layout: Layout, whole: Layout, plan: Everyone
) -> Tensor:
    q, k, v = operands
    own = Placement.chosen(whole, layout.placement.columns[layout.placement.rank])

    def pieces(questions: Tensor, asked: Layout) -> list[tuple[slice, list[Piece]]]:
        call = PatternCall(layer, questions, k, v, asked, own, layer.scale)

        def bias(rows: slice, columns: slice) -> Tensor:
            return everyone_bias(call, asked.cut(rows), own.cut(columns))

        uniform = not layer.has_position_bias
        return pieces_of(questions, asked, own, bias, causal=layer.causal, uniform=uniform)

    scale = layer.scale
    if scale <= 0:  # as of `PatternCall`
        q, scale = q * (-1 if scale else 0), -scale or 1.0
    return with_rows_of_everyone(out, q, k, v, plan, pieces, scale=scale, sink=layer.sink)


# --- a ring ----------------------------------------------------------------------------------------------------------


def _ringed(layer: Any, x: Tensor, layout: Layout, whole: Layout) -> Tensor:
    if layer.kernel not in RING_KERNELS:
        raise Unsupported(
            layer.name, f"kernel={layer.kernel} with a sequence on several processes",
            "keys pass by in a ring, which computes tiles", " or ".join(f"kernel={name}" for name in RING_KERNELS),
        )  # fmt: skip
    if layer.bias_parameters():
        raise Unsupported(
            layer.name, "a learned bias with a sequence on several processes",
            "the gradient of a bias is not summed over a ring", "a reach that ends (a Band)",
        )  # fmt: skip
    q, (k, v) = layer.scheme.turn(layer._heads(layer.to_q(x)), layout), layer._own_keys(x, layout)
    ring = _turns(layer, layout, whole)
    scale = layer.scale
    if scale <= 0:  # as of `PatternCall`
        q, scale = q * (-1 if scale else 0), -scale or 1.0

    def pieces(turn: int) -> list[tuple[slice, list[Piece]]]:
        keys = ring.blocks[turn]

        def bias(rows: slice, columns: slice) -> Tensor:
            return layer.full_bias(layout.cut(rows), keys.cut(columns))

        uniform = layer.reach.weights == "uniform" and not layer.has_position_bias
        return pieces_of(q, layout, keys, bias, causal=layer.causal, uniform=uniform)

    return ring_attention(q, k, v, ring, pieces, scale=scale, asked=layout.asked, sink=layer.sink)


def _turns(layer: Any, layout: Layout, whole: Layout) -> Ring:
    def make() -> tuple[Ring, Layout]:
        placement, reach = layout.placement, layer.reach
        # nobody is left out: rows that see everything see what passes by, too
        unmarked = whole.with_globals(np.zeros_like(whole.host.is_global))
        return ring_of(placement, whole, layout, needs(unmarked, placement.columns, reach, causal=layer.causal)), whole

    return layout.plan(("ring", id(whole), layer.reach, layer.causal), make)[0]
