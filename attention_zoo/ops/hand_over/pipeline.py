"""A layer over a sequence whose columns lie in several processes, by handing its state from one to the next.

    s_0 = initial;   out_r, s_{r+1} = layer(x_r, s_r)            r: process; s travels, and its gradient travels back

So whatever carries a state from call to call is right here as it is in decoding: process r's call equals the columns r
of one call over all. Process r waits for s_r, hence they run one after another, in a layer. They are busy since layers
follow each other (while process r is in layer i, process r + 1 may be in layer i - 1), and rows, which are handed on in
`parts`: with n layers or parts and N processes, each is idle (N - 1) / (n + N - 1) of the time.

Backward goes the other way. Receiving and sending are identities on the hidden states that pass through, so that they
happen whatever a state is used for: sending before all that the layer does in backward, receiving after all of it. A
state without gradients (cut off, or under no_grad) has none to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.layout.layout import Layout
from attention_zoo.layout.placement import Placement
from attention_zoo.ops.hand_over.tree import Leaf, flattened, grown, leaves
from attention_zoo.ops.hand_over.wire import GRADIENTS, STATES, Wire

Count = Callable[[str, int], None]
KIND = "states"
"""Under which bytes are counted."""


class Neighbours(NamedTuple):
    """Of a process.

    Fields:
        before, after: whom states come from and go to; None at the ends.
        told: in which pass, "forward" or "backward", how many bytes were sent.
    """

    before: Wire | None
    after: Wire | None
    told: Count


def neighbours(placement: Placement, device: torch.device) -> Neighbours:
    """Of this process, where columns are in the order of processes."""
    rank, size = placement.rank, placement.size

    def wire(peer: int) -> Wire | None:
        return Wire(placement.group, peer, device) if 0 <= peer < size else None

    return Neighbours(wire(rank - 1), wire(rank + 1), lambda way, count: placement.traffic.add(KIND, way, count))


def received(x: Tensor, pattern: Any, wire: Wire, count: Count) -> tuple[Tensor, Any]:
    """x, and the state that the process before sends. It has gradients where that one's has."""
    codes = wire.receive_numbers(STATES)
    likes = leaves(codes)
    tensors = wire.receive_all(likes, STATES, x.device)
    learn = [like.learns for like in likes]
    if any(learn) and torch.is_grad_enabled():
        anchor = torch.zeros((), requires_grad=True, device=x.device)
        x, *known = _Received.apply(wire, count, anchor, x, *(t for t, yes in zip(tensors, learn) if yes))
        given = iter(known)
        tensors = [next(given) if yes else tensor for tensor, yes in zip(tensors, learn)]
    return x, grown(codes, tensors, pattern)


def sent(hidden: Tensor, state: Any, wire: Wire, count: Count) -> Tensor:
    """hidden, after the state has gone to the process behind."""
    tensors, codes = flattened(state)
    wire.send_numbers(codes, STATES)
    count("forward", wire.send_all(tensors, STATES) + 8 * (len(codes) + 1))
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    if learning and torch.is_grad_enabled():
        hidden = _Sent.apply(wire, hidden, *learning)
    return hidden


class _Received(torch.autograd.Function):
    """Identity; in backward the state's gradients go back where it came from."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, count: Count, anchor: Tensor, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.wire, ctx.count = wire, count
        return x.view_as(x), *(tensor.view_as(tensor) for tensor in state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.count("backward", ctx.wire.send_all(grads, GRADIENTS))
        return None, None, None, grad, *(None for _ in grads)


class _Sent(torch.autograd.Function):
    """Identity on the hidden states; in backward the state's gradients come back first."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, hidden: Tensor, *state: Tensor) -> Tensor:
        ctx.wire = wire
        ctx.likes = [Leaf(tensor.dtype, True, tuple(tensor.shape)) for tensor in state]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad, *ctx.wire.receive_all(ctx.likes, GRADIENTS, grad.device)


Call = Callable[[Tensor, Layout, Any, slice], Any]


def in_turn(
    call: Call, initial: Callable[[int], Any], x: Tensor, layout: Layout, neighbours: Neighbours, parts: int
) -> list[Any]:
    """What `call` returns for each lot of rows, with a state before and, where it has `hidden` and `state`, after.

    Args:
        call: (x, layout, state, rows) -> Output of these rows.
        initial: number of rows -> an empty state: where the sequence begins, and what states are like.
        layout: of this process's columns.
        parts: lots that the rows are cut into, at most.
    """
    before, after, count = neighbours
    rows = len(x)
    size = -(-rows // max(1, min(parts, rows))) if rows else 1
    made = []
    for start in range(0, max(rows, 1), size):
        some = slice(start, start + size)
        part = x if size >= rows else x[some]
        state = initial(len(part))
        if before is not None:
            part, state = received(part, state, before, count)
        out = call(part, layout if size >= rows else rows_of(layout, some), state, some)
        if after is not None:
            out = out._replace(hidden=sent(out.hidden, out.state, after, count))
        made.append(out)
    return made


def rows_of(layout: Layout, rows: slice) -> Layout:
    """The same columns of these rows; one object for each cut."""

    def cut() -> Layout:
        fields = layout.cut(slice(None), rows)
        return Layout(*fields)._with(type(layout.host)(*(field[rows] for field in layout.host)))

    return layout.plan(("rows", rows.start, rows.stop), cut)
