"""Gradients of a recurrence over blocks, the last turn first."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.layout.host import tensor_of
from attention_zoo.ops.recurrence.turns import Run, Weights, renewed


class Back:
    """What gradients come together on the way back.

    Gradients of weights are products over many states at once, but not over all: of what they are made of (four and
    more times the width of the model) only a window of states is held, those of successive turns, the last ones first.

    Attributes:
        states: the numbers of the window's states.
        seen: [w, S, E], the vectors as projections saw them.
        dvectors: [w, S, E], of the vectors of each state.
        dprojected: [w, S, F], of what each state was projected to.
        draw: [w, S, R], of what was projected out of heads; of blocks alone.
    """

    states: slice
    seen: Tensor
    dvectors: Tensor
    dprojected: Tensor
    draw: Tensor

    def __init__(self, run: Run, vectors: Tensor, found: Tensor, grads: tuple[Any, ...]):
        """`grads`: of keys and values of all states, and of their vectors, where they were asked for."""
        self.run, self.vectors, self.found, self.gate, self.grads = run, vectors, found, run.gate(), grads
        w = run.weights
        self.sums = {name: torch.zeros_like(x) for name, x in w._asdict().items() if x is not None}
        self.windows = run.windows()
        self._open()

    def mine(self, held: Float[Tensor, "w S *f"], turn: int) -> Float[Tensor, "b S *f"]:
        """Of the window's, those that a turn leaves."""
        states = self.run.left(turn)
        return held[states.start - self.states.start : states.stop - self.states.start]

    def _open(self) -> None:
        """The next window."""
        run, self.states = self.run, self.windows.pop()
        vectors = self.vectors[self.states]
        self.seen, self.mean, self.deviation = run.seen(vectors)
        dkeys, dvalues, dvectors = (None if x is None else x[self.states] for x in self.grads)
        self.dvectors = torch.zeros_like(vectors) if dvectors is None else dvectors.clone()
        rows = vectors.shape[:2]
        self.dprojected = run.scratch("dprojected", (*rows, len(run.weights.into)), vectors).zero_()
        into = self.dprojected[..., : run.KV].unflatten(-1, (2, run.K, run.D))
        into[:, :, 0], into[:, :, 1] = dkeys, dvalues
        self.draw = run.scratch("draw", (*rows, len(run.weights.out)), vectors)

    def _close(self) -> None:
        """The window's share of the gradients of weights."""
        run, sums = self.run, self.sums
        dprojected = self.dprojected.flatten(0, 1)
        sums["into"].addmm_(dprojected.T, self.seen.flatten(0, 1))
        if "into_bias" in sums:
            sums["into_bias"] += dprojected.sum(0)
        blocks = slice(max(0, self.states.start - run.first), self.states.stop - run.first)
        skipped = len(self.draw) - (blocks.stop - blocks.start)
        if blocks.start >= blocks.stop:
            return
        draw = self.draw[skipped:].flatten(0, 1)
        sums["out"].addmm_(draw.T, self.found[blocks].flatten(0, 1))
        if "out_bias" in sums:
            sums["out_bias"] += draw.sum(0)
        if self.gate is not None:
            # before - left = (1 - g) · (before - z): z itself is not needed
            before = self.vectors.index_select(0, tensor_of(run.begun[blocks], draw.device))
            apart = before.sub_(self.vectors[run.first :][blocks]).mul_(self.dvectors[skipped:])
            sums["keep"].addcmul_(apart.sum((0, 1)), self.gate)

    def through_projections(self, turn: int) -> None:
        """Of the vectors before a turn: what comes through their projections is added to the rest."""
        width = self.run.KV if turn == self.run.G else None
        dseen = self.mine(self.dprojected, turn - 1)[..., :width] @ self.run.weights.into[:width]
        self.sums["identity"] += dseen.sum(0)
        vectors = self.vectors[self.run.left(turn - 1)]
        mean, deviation = (self.mine(x, turn - 1) for x in (self.mean, self.deviation))
        more = torch.ops.aten.native_layer_norm_backward(
            dseen, vectors, vectors.shape[-1:], mean, deviation, None, None, [True, False, False]
        )[0]
        self.mine(self.dvectors, turn - 1).add_(more)

    def through_gate(self, turn: int, before: Float[Tensor, "c S E"]) -> tuple[Tensor, Tensor]:
        """Of what a turn found, [2, c, H, S, D], and its sums with that, negative, [2, c, H, S, 1]."""
        run, blocks = self.run, self.run.blocks(turn)
        grad, found, stops = self.mine(self.dvectors, turn), self.found[blocks], run.course.stops
        if stops is not None and stops[blocks].any():
            grad.masked_fill_(tensor_of(stops[blocks], grad.device)[:, None, None], 0)
        if self.gate is not None:
            draw = torch.mul(grad, 1 - self.gate, out=self.mine(self.draw, turn))
            old = grad * self.gate
        else:
            with torch.enable_grad():
                held, raw = (x.detach().requires_grad_() for x in (before, run.raw(found)))
                old, draw = torch.autograd.grad(renewed(held, raw, None), (held, raw), grad)
            self.mine(self.draw, turn).copy_(draw)
        dfound = draw @ run.weights.out
        delta = (dfound * found).unflatten(-1, (2, -1, run.D)).sum(-1, keepdim=True).neg_()
        if run.left(turn).start == self.states.start:
            self._close()
            self._open()
        self._add(self.dvectors, turn, old)
        return run.by_heads(dfound).contiguous(), delta.permute(2, 0, 3, 1, 4).contiguous()

    def hand(self, turn: int, down: Float[Tensor, "2 c K S D"], dqueries: Float[Tensor, "2 c H S D"]) -> None:
        """What the states before a turn get of it."""
        KV, D = self.run.KV, self.run.D
        for grad, into in (down, self.dprojected[..., :KV]), (dqueries, self.dprojected[..., KV:]):
            self._add(into.unflatten(-1, (2, -1, D)), turn, grad.permute(1, 3, 0, 2, 4))

    def _add(self, into: Float[Tensor, "w S *f"], turn: int, grad: Float[Tensor, "c S *f"]) -> None:
        """To the states that a turn began with."""
        states = self.mine(into, turn - 1)
        if turn:
            states[: len(grad)] += grad
        else:
            start = tensor_of(self.run.course.start, grad.device)
            states.index_put_((start,), grad, accumulate=True)  # in a fixed order

    def weights(self) -> Weights:
        """Gradients of the weights, behind the first turn."""
        self._close()
        return Weights(*(self.sums.get(name) for name in Weights._fields))  # type: ignore[arg-type]
