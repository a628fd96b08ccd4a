"""Compressive memory of the package compressive-transformer-pytorch, one segment after the other."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Core, Shape
from attention_zoo.measure.peers.adapter import Adapter, as_heads, as_rows, in_turn, nothing, stand_in
from attention_zoo.measure.work import Work, core_work, layer_work


class Seen(NamedTuple):
    """A segment and what it sees: queries and own keys [start, stop), memory from `memory` on, and compressed states.

    Fields:
        slots: [first, last) of all compressed states of the document.
    """

    start: int
    stop: int
    memory: int
    slots: slice


class CompressiveTransformerPytorch(Adapter):
    """Its SelfAttention, called for each segment with the memories that stand before it."""

    title = "compressive-transformer-pytorch"
    fair = (
        "Same segments, memories and ratio; each segment is a call, forward and backward, as in training. A layer has "
        "its convolution and loss on both sides, and keys and values that are thawed again before each call. It has no "
        "u and v: queries meet keys and distances as they are."
    )
    needs = "compressive-transformer-pytorch>=0.4,<0.5"
    module = "compressive_transformer_pytorch"
    backend = "compressive"
    operands = "q k v z y r"
    small: ClassVar[dict[str, Any]] = {"segment_length": 8, "memory_length": 12, "compressed_length": 5, "ratio": 2}
    small_length = 53

    def __init__(self, layer: Any, shape: Shape):
        from compressive_transformer_pytorch.compressive_transformer_pytorch import SelfAttention

        if layer.compression != "conv":
            raise Unsupported(self.title, f"compression={layer.compression}", "it convolves", "compression=conv")
        if layer.memory_length < layer.ratio or layer.segment_length % layer.ratio or layer.memory_length % layer.ratio:
            raise Unsupported(
                self.title, "ratio", "segments that are no whole groups get zeros in front",
                "segment_length and memory_length that are multiples of it",
            )  # fmt: skip
        if layer.dim != layer.heads * layer.head_width:
            raise Unsupported(self.title, "head_width", "its heads share the width", "head_width=null")
        super().__init__(layer, shape)
        self.segment, self.memory, self.ratio = layer.segment_length, layer.memory_length, layer.ratio
        self.slots = layer.compressed_length
        self.released = SelfAttention(layer.dim, self.segment, self.memory, self.slots, self.ratio, self.heads)
        self.released.to(shape.device, shape.dtype).scale = layer.scale

    def enter(self, x: Tensor) -> Tensor:
        return as_rows(x)

    def leave(self, out: Tensor) -> Tensor:
        return as_heads(out, self.heads)

    def call(self, *operands: Tensor) -> Tensor:
        """One segment.

        Args:
            operands: q [B, l, H·D], keys and values side by side [B, n, 2·H·D], keys of falling distances [H, n, D].
        """
        self.queries.tensor, self.keys.tensor, distances = operands
        (B, l, _), n = self.queries.tensor.shape, distances.shape[1]
        self.released.dim_head = distances.shape[2]
        own, memory = nothing(B, l, 1, distances), nothing(B, n - l, 1, distances)
        out: Tensor = self.released(own, (memory, memory[:, :0]), distances, calc_memory=False)[0]
        return out

    def from_ours(self, *given: Tensor) -> Tensor:
        """All segments of one call of ours, in heads twice as wide: beside each other stand q + u and q + v, [k, 0] and
        [0, r], so that one of its products is ours with keys, and the other with distances."""
        q, k, v, z, y, r = given
        self._take_apart()
        wider = 0, self.width
        parts: list[Tensor] = []
        for each in self._segments():
            rows = q[:, :, each.start : each.stop]
            rows = torch.cat([rows + self.layer.u[:, None], rows + self.layer.v[:, None]], -1)
            keys, values = (
                nn.functional.pad(torch.cat([a[:, :, each.slots], b[:, :, each.memory : each.stop]], 2), wider)
                for a, b in ((z, k), (y, v))
            )
            distances = nn.functional.pad(r[: keys.shape[2]].flip(0).transpose(0, 1), wider[::-1])
            out = self.call(as_rows(rows), torch.cat([as_rows(keys), as_rows(values)], -1), distances)
            parts.append(self.leave(out)[..., : self.width])
        return torch.cat(parts, 2)

    def work(self, variant: str, phase: str) -> Work:
        """See `Adapter`; segment by segment."""
        self.check_phase(phase)
        backward = phase == "forward_backward"
        if variant == "core":
            self._take_apart()
            works = [core_work(self._segment_core(each), backward=backward) for each in self._segments()]
        else:
            self.released.train(backward)
            place = nn.Parameter(self._randn(self.heads, self.segment + self.memory + self.slots, self.width))
            works = [self._segment_layer(each, place, backward) for each in self._segments()]
        return in_turn(works, self.length)

    def _take_apart(self) -> None:
        self.queries, self.keys = stand_in(self.released, "to_q", "to_kv")
        self.released.to_out = nn.Identity()

    def _segments(self) -> list[Seen]:
        found = []
        for start in range(0, self.length, self.segment):
            memory = max(0, start - self.memory)
            last = memory // self.ratio
            slots = slice(max(0, last - self.slots), last)
            found.append(Seen(start, min(start + self.segment, self.length), memory, slots))
        return found

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.shape.device, dtype=self.shape.dtype)

    def _segment_core(self, each: Seen) -> Core:
        B, width, rows = self.shape.batch, self.heads * self.width, each.stop - each.start
        keys = each.stop - each.memory + each.slots.stop - each.slots.start
        sizes = ((B, rows, width), (B, keys, 2 * width), (self.heads, keys, self.width))
        return Core(tuple(self._randn(*size) for size in sizes), self.call, sizes[0], rows)

    def _segment_layer(self, each: Seen, place: Tensor, backward: bool) -> Work:
        B, dim = self.shape.batch, self.layer.dim
        memories = tuple(
            self._randn(B, count, dim) for count in (each.start - each.memory, each.slots.stop - each.slots.start)
        )

        def outputs(x: Tensor) -> list[Tensor]:
            self.released.to_kv.weight.requires_grad_(backward)  # frozen by the call before
            hidden, _, loss = self.released(x, memories, place)
            return [hidden, loss]

        x = self._randn(B, each.stop - each.start, dim)
        return layer_work(outputs, x, [place, *self.released.parameters()], backward=backward)
