"""Transformer-XL's attention as it was first released: all scores of a segment, and the relative shift by copying.

Dai et al. 2019, appendix B, in the axes of the released code [queries, keys, batch, head]. Written here, since the
released module is no longer shipped by anybody; segments go one after the other, forward and backward, as in training,
so that only the matrices of one are in memory.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attention_zoo.measure.core import Core, Shape
from attention_zoo.measure.peers.adapter import Adapter, in_turn
from attention_zoo.measure.work import Work, core_work, layer_work


class DenseXL(Adapter):
    """One attention of the original formulation after the other, over the stretch that ours takes in one call."""

    title = "XL dense"
    fair = (
        "Same segments and memory, distances and biases; each segment is one call of the original formulation, given "
        "its queries and the keys and values of its memory and itself."
    )
    backend = "transformer_xl"
    operands = "q k v r"
    small: ClassVar[dict[str, Any]] = {"segment_length": 7, "memory_length": 10}
    small_length = 33

    def __init__(self, layer: Any, shape: Shape):
        super().__init__(layer, shape)
        self.segment, self.memory = layer.segment_length, layer.memory_length

    def enter(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3)  # [L, B, H, D]

    def leave(self, out: Tensor) -> Tensor:
        return out.permute(1, 2, 0, 3)

    def call(self, *operands: Tensor) -> Tensor:
        """One segment.

        Args:
            operands: q [l, B, H, D], k and v [m+l, B, H, D], r [m+l, H, D] of falling distances, u and w [H, D].
        """
        q, k, v, r, u, w = operands
        content = torch.einsum("ibnd,jbnd->ijbn", q + u, k)
        place = _shift(torch.einsum("ibnd,jnd->ijbn", q + w, r))
        scores = (content + place).mul_(self.layer.scale)
        hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(1 + len(k) - len(q))
        scores = scores.masked_fill(hidden[:, :, None, None], -torch.inf)
        return torch.einsum("ijbn,jbnd->ibnd", scores.softmax(1), v)

    def from_ours(self, *given: Tensor) -> Tensor:
        """All segments of one call of ours; gradients of keys add over the segments that see them."""
        q, k, v = map(self.enter, given[:3])
        parts = []
        for start, stop in self._segments():
            keys = slice(start, self.memory + stop)  # the memory stands in front
            r = given[3][: self.memory + stop - start].flip(0)
            parts.append(self.call(q[start:stop], k[keys], v[keys], r, self.layer.u, self.layer.v))
        return self.leave(torch.cat(parts))

    def _segments(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.segment, self.length)) for start in range(0, self.length, self.segment)]

    def work(self, variant: str, phase: str) -> Work:
        """See `Adapter`; segment by segment."""
        self.check_phase(phase)
        backward = phase == "forward_backward"
        if variant == "core":
            works = [core_work(self._segment_core(stop - start), backward=backward) for start, stop in self._segments()]
        else:
            layer = _Layer(self).to(self.shape.device, self.shape.dtype)
            works = [self._segment_layer(layer, start, stop, backward) for start, stop in self._segments()]
        return in_turn(works, self.length)

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.shape.device, dtype=self.shape.dtype)

    def _segment_core(self, length: int) -> Core:
        B, H, D, keys = self.shape.batch, self.heads, self.width, self.memory + length
        sizes = ((length, B, H, D), (keys, B, H, D), (keys, B, H, D), (keys, H, D), (H, D), (H, D))
        return Core(tuple(self._randn(*size) for size in sizes), self.call, sizes[0], length)

    def _segment_layer(self, layer: _Layer, start: int, stop: int, backward: bool) -> Work:
        """Nothing is before the first segment, as in a layer of ours without state."""
        memory = self._randn(self.shape.batch, min(start, self.memory), self.layer.dim)
        x = self._randn(self.shape.batch, stop - start, self.layer.dim)
        return layer_work(lambda x: [layer(x, memory)], x, list(layer.parameters()), backward=backward)


class _Layer(nn.Module):
    """The projections around it, biases of content and place, and waves for the distances."""

    def __init__(self, adapter: DenseXL):
        super().__init__()
        dim, width = adapter.layer.dim, adapter.heads * adapter.width
        self.adapter, self.heads = adapter, adapter.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, width) for _ in range(3))
        self.to_r, self.to_out = nn.Linear(dim, width, bias=False), nn.Linear(width, dim)
        self.u, self.w = (nn.Parameter(torch.zeros(adapter.heads, adapter.width)) for _ in range(2))
        self.register_buffer("frequencies", 10_000.0 ** -(torch.arange(0, dim, 2.0) / dim), persistent=False)

    frequencies: Tensor

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        hidden = torch.cat([memory, x], 1)
        distance = torch.arange(hidden.shape[1] - 1, -1, -1, device=x.device, dtype=x.dtype)
        angle = distance[:, None] * self.frequencies
        r = self.to_r(torch.cat([angle.sin(), angle.cos()], -1)).unflatten(-1, (self.heads, -1))
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for project, y in ((self.to_q, x), (self.to_k, hidden), (self.to_v, hidden))
        )
        out = self.adapter.call(q, k, v, r, self.u, self.w)
        return self.to_out(out.transpose(0, 1).flatten(2))


def _shift(x: Tensor) -> Tensor:
    """[i, j, b, n]: row i moved left by as many places as it is above the last."""
    padded = torch.cat([x.new_zeros(len(x), 1, *x.shape[2:]), x], 1)
    return padded.view(x.shape[1] + 1, len(x), *x.shape[2:])[1:].view_as(x)
