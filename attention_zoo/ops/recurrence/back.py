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
        queries: [2, w, H, S, D], what they asked, of all of the window by one product.
        dvectors: [w, S, E], of the vectors of each state.
        dprojected: [w, S, F], of what each state was projected to.
        draw: [w, S, R], of what was projected out of heads; of blocks alone.
    """

    states: slice
    seen: Tensor
    queries: Tensor
    dvectors: Tensor
    dprojected: Tensor
    draw: Tensor

    def __init__(self, run: Run, vectors: Tensor, kv: Tensor, found: Tensor, grads: tuple[Any, ...]):
        """`grads`: of keys and values of all states, and of their vectors, where they were asked for."""
        self.run, self.vectors, self.found, self.gate, self.grads = run, vectors, found, run.gate(), grads
        # views of all turns at once, since a turn's own would each be an operator
        self.left, self.held, self.looked_up = run.by_states(vectors), run.by_states(kv, 1), run.by_blocks(found)
        self.found_by_heads = run.by_heads(found).split(run.counts, 1)
        self.into, self.into_keys = run.weights.into, run.weights.into[: run.KV]
        self.open_gate: Any = None if self.gate is None else 1 - self.gate
        self.first_turn = run.G
        w = run.weights
        self.sums = {name: torch.zeros_like(x) for name, x in w._asdict().items() if x is not None}
        self.windows = run.windows()
        self._open()

    def mine(self, what: str, turn: int) -> Float[Tensor, "b S *f"]:
        """Of the window's tensor of that name, what a turn leaves."""
        return self.parts[what][turn - self.first_turn]

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
        self.queries = run.by_heads(run.project(self.seen, slice(run.KV, None))).contiguous()
        stop = self.first_turn
        while self.first_turn >= 0 and run.left(self.first_turn - 1).start >= self.states.start:
            self.first_turn -= 1
        sizes = [self.run.first if turn < 0 else run.counts[turn] for turn in range(self.first_turn, stop)]
        names = "seen", "mean", "deviation", "dvectors", "dprojected", "draw"
        self.parts = {name: getattr(self, name).split(sizes) for name in names}
        # of products, which then need no view of their own
        counts = [size * run.S for size in sizes]
        for name in ("dprojected", "draw"):
            self.parts[f"{name}_rows"] = getattr(self, name).flatten(0, 1).split(counts)
        of_keys, of_queries = self.dprojected.split([run.KV, self.dprojected.shape[2] - run.KV], 2)
        by_heads = {"queries": self.queries, "of_keys": run.by_heads(of_keys), "of_queries": run.by_heads(of_queries)}
        self.parts |= {name: x.split(sizes, 1) for name, x in by_heads.items()}

    def _close(self) -> None:
        """The window's share of the gradients of weights."""
        run, sums = self.run, self.sums
        dprojected = self.dprojected.flatten(0, 1)
        sums["into"].addmm_(dprojected.T, self.seen.flatten(0, 1))
        # all that comes to what projections saw, by position: the sum goes through them, not each turn's
        sums["identity"].addmm_(self.dprojected.sum(0), self.into)
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
        dprojected, vectors = self.mine("dprojected_rows", turn - 1), self.left[turn]
        last = turn == self.run.G  # nobody looks from there
        dseen = dprojected[:, : self.run.KV] @ self.into_keys if last else dprojected @ self.into
        dseen = dseen.view(vectors.shape)
        mean, deviation = self.mine("mean", turn - 1), self.mine("deviation", turn - 1)
        more = torch.ops.aten.native_layer_norm_backward(
            dseen, vectors, vectors.shape[-1:], mean, deviation, None, None, [True, False, False]
        )[0]
        self.mine("dvectors", turn - 1).add_(more)

    def through_gate(self, turn: int, before: Float[Tensor, "c S E"]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of what a turn found, and its sums with that, negative: of each kind, `Run.kinds`."""
        run, blocks = self.run, self.run.blocks(turn)
        grad, found, stops = self.mine("dvectors", turn), self.looked_up[turn], run.course.stops
        if stops is not None and stops[blocks].any():
            grad.masked_fill_(tensor_of(stops[blocks], grad.device)[:, None, None], 0)
        if self.gate is not None:
            torch.mul(grad, self.open_gate, out=self.mine("draw", turn))
            old = grad * self.gate
        else:
            with torch.enable_grad():
                held, raw = (x.detach().requires_grad_() for x in (before, run.raw(found)))
                old, draw = torch.autograd.grad(renewed(held, raw, None), (held, raw), grad)
            self.mine("draw", turn).copy_(draw)
        dfound = (self.mine("draw_rows", turn) @ run.weights.out).view(found.shape)
        dfound = run.by_heads(dfound).contiguous()
        delta = (dfound * self.found_by_heads[turn]).sum(-1, keepdim=True).neg_()
        if turn == self.first_turn:
            self._close()
            self._open()
        self._add("dvectors", turn, old)
        return run.kinds(dfound), run.kinds(delta)

    def hand(self, turn: int, down: Float[Tensor, "2 c K S D"], dqueries: Float[Tensor, "2 c H S D"]) -> None:
        """What the states before a turn get of it."""
        self._add("of_keys", turn, down, 1)
        self._add("of_queries", turn, dqueries, 1)

    def asked(self, turn: int) -> Float[Tensor, "2 c H S D"]:
        """What the vectors that a turn began with asked; those of a kind stand together."""
        queries = self.mine("queries", turn - 1)
        if turn:
            return queries if queries.shape[1] == self.run.counts[turn] else queries[:, : self.run.counts[turn]]
        return queries.index_select(1, tensor_of(self.run.course.start, queries.device))

    def _add(self, what: str, turn: int, grad: Tensor, dim: int = 0) -> None:
        """To the states that a turn began with, which stand in this dimension."""
        states = self.mine(what, turn - 1)
        if turn:
            (states if states.shape == grad.shape else states.narrow(dim, 0, grad.shape[dim])).add_(grad)
        else:
            start = tensor_of(self.run.course.start, grad.device)
            # in a fixed order
            states.movedim(dim, 0).index_put_((start,), grad.movedim(dim, 0), accumulate=True)

    def weights(self) -> Weights:
        """Gradients of the weights, behind the first turn."""
        self._close()
        return Weights(*(self.sums.get(name) for name in Weights._fields))  # type: ignore[arg-type]
