"""Full attention over a sequence that several processes own: keys and values pass by, block after block.

In step t a process computes with the columns of the process t before it in the ring, while those of the next step are
under way: two blocks are here at a time, never all keys. Results are merged by log-sum-exp in float32 at least.
Backward passes keys and values by again, with the merged log-sum-exp; each block's gradients go to its owner while the
next block is computed, and the owner adds them in the order of steps.

A block comes straight from its owner and holds only what somebody sees: of causal sequences nothing that lies behind,
of packed ones nothing of other documents. Work is balanced where the owner says so (`layout.placement.zigzag`).

    lse = log(e^lse_a + e^lse_b),   out = out_a · e^(lse_a - lse) + out_b · e^(lse_b - lse)     of parts a and b

Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers"; balance: Brandon et al. 2023, "Striped
Attention", and the zig-zag order of the Llama 3 herd (2024, §3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.needs import Needs
from attention_zoo.layout.placement import Placement
from attention_zoo.ops.exchange.messages import Messages, next_number
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.softmax.partial import LOG2E, Scratch
from attention_zoo.ops.softmax.pieces import Piece, add_gradients, add_pieces, merged

FORWARD, AGAIN, GRADIENTS = range(3)
"""Kinds of messages."""
Pieces = Callable[[int], list[tuple[slice, list[Piece]]]]


class Step(NamedTuple):
    """One turn of the ring.

    Fields:
        source: of whom a block comes; step 0: this process itself.
        target: to whom this process's own goes.
        comes: how many columns come.
        goes: which of its own columns go.
    """

    source: int
    target: int
    comes: int
    goes: Int[Tensor, " n"]


class Ring(NamedTuple):
    """The turns of the ring.

    Fields:
        steps: the first is this process's own block.
        blocks: what the columns of each step's block are.
    """

    placement: Placement
    steps: tuple[Step, ...]
    blocks: tuple[Layout, ...]


def ring_of(placement: Placement, whole: Layout, own: Layout, needs: Needs) -> Ring:
    """The turns by which each process sees what it needs (of all key heads alike)."""
    me, size, columns, device = placement.rank, placement.size, placement.columns, own.valid.device
    steps, blocks = [], []
    for turn in range(size):
        source, target = (me - turn) % size, (me + turn) % size
        wanted = columns[source][needs[me][0, columns[source]]]
        goes = np.flatnonzero(needs[target][0, columns[me]])
        steps.append(Step(source, target, len(wanted), tensor_of(goes, device)))
        blocks.append(Placement.chosen(whole, wanted) if turn else own)
    return Ring(placement, tuple(steps), tuple(blocks))


def ring_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K L D"],
    v: Float[Tensor, "B K L D"],
    ring: Ring,
    pieces: Pieces,
    *,
    scale: float,
    asked: Tensor | None = None,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """What this process's queries see of the whole sequence.

    Args:
        q, k, v: of its own columns.
        pieces: of each step.
        asked: bool [B, 1, L, 1], rows that are queries; the others yield zeros. None: all.
        sink: for each head the score of one more key, whose value is zero.
    """
    return _Ring.apply(q, k, v, sink, ring, pieces, scale, asked)


class _Passing:
    """Keys and values of step after step; the next step's are under way while this one's are used."""

    def __init__(self, ring: Ring, k: Tensor, v: Tensor, number: int, kind: int):
        self.ring, self.k, self.v, self.number, self.kind = ring, k, v, number, kind

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        k, v, count = self.k, self.v, len(self.ring.steps)
        for turn in range(count):
            coming = self._post(turn + 1) if turn + 1 < count else None
            yield turn, k, v
            if coming is not None:
                messages, block = coming
                messages.end()
                k, v = block

    def _post(self, turn: int) -> tuple[Messages, Tensor]:
        step, size = self.ring.steps[turn], self.ring.placement.size
        B, K, _, D = self.k.shape
        sent = [self.k.new_empty(0)] * size
        came = list(sent)
        sent[step.target] = torch.stack([x.index_select(2, step.goes) for x in (self.k, self.v)])
        came[step.source] = block = self.k.new_empty(2, B, K, step.comes, D)
        names = "ring", "forward" if self.kind == FORWARD else "backward"
        return Messages(self.ring.placement, self.number, self.kind, sent, came, names), block


class _Ring(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, ring: Ring, pieces: Pieces, *rest: Any):
        scale, asked = rest
        ctx.number = next_number(ring.placement)
        exact = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full((*q.shape[:3], 1), -torch.inf, dtype=exact, device=q.device)
        scratch = Scratch()
        for turn, keys, values in _Passing(ring, k, v, ctx.number, FORWARD):
            add_pieces(q, keys, values, pieces(turn), scale=scale, into=(out, lse), scratch=scratch)
        if sink is not None:
            merged(out, lse, torch.zeros_like(out), sink.to(exact).view(-1, 1, 1).expand_as(lse))
        if asked is not None:
            out.masked_fill_(~asked, 0)
            lse.masked_fill_(~asked, -torch.inf)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *([] if sink is None else [sink]))
        ctx.ring, ctx.pieces, ctx.scale = ring, pieces, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse, *sinks), ring = saved, ctx.ring
        exact, scratch = lse.dtype, Scratch()
        grad = grad.to(exact)
        delta = (grad * out).sum(-1, keepdim=True).neg_()
        dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
        going: tuple[Messages, Tensor, Tensor] | None = None
        for turn, keys, values in _Passing(ring, k, v, ctx.number, AGAIN):
            into = torch.zeros((2, *keys.shape), dtype=exact, device=q.device) if turn else (dk, dv)
            run = ctx.pieces(turn)
            add_gradients(
                grad, q, keys, values, delta, lse, run, scale=ctx.scale, into=(dq, into[0], into[1]), scratch=scratch
            )
            _settle(going, dk, dv)
            going = _send(ring, turn, ctx.number, into, k) if turn else None
        _settle(going, dk, dv)
        dsink = None
        if sinks:
            shift = lse.masked_fill(lse == -torch.inf, torch.inf) * -LOG2E
            weights = (sinks[0].to(exact).view(-1, 1, 1) * LOG2E + shift).exp2_()
            dsink = (weights * delta).sum((0, 2, 3)).to(sinks[0].dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None, None


def _send(ring: Ring, turn: int, number: int, grads: Any, k: Tensor) -> tuple[Messages, Tensor, Tensor]:
    """A block's gradients to its owner, and those of this process's own that come from who had it in this step."""
    step, size = ring.steps[turn], ring.placement.size
    sent = [k.new_empty(0)] * size
    came = list(sent)
    sent[step.source] = grads
    came[step.target] = share = torch.empty(
        (2, *k.shape[:2], len(step.goes), k.shape[3]), dtype=grads.dtype, device=k.device
    )
    return Messages(ring.placement, number, GRADIENTS, sent, came, ("ring", "backward")), share, step.goes


def _settle(going: tuple[Messages, Tensor, Tensor] | None, dk: Tensor, dv: Tensor) -> None:
    """Add what came of this process's own keys."""
    if going is None:
        return
    messages, share, columns = going
    messages.end()
    dk.index_add_(2, columns, share[0])
    dv.index_add_(2, columns, share[1])
