"""Sliding window of the package local-attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Adapter


class LocalAttention(Adapter):
    """The package local-attention with an exact window."""

    title = "local-attention"
    fair = "Its `exact_windowsize`: the same window, by blocks of the window's size and a mask; no rotary positions."
    needs = "local-attention>=1.11.2,<2"
    module = "local_attention"
    backend = "longformer"
    small: ClassVar[dict[str, Any]] = {"window": 5}

    def __init__(self, layer: Any, shape: Shape):
        from local_attention import LocalAttention as Released

        if layer.dilation != 1:
            raise Unsupported(self.title, "dilation", "it has none", "dilation=1")
        self.window = layer.window
        super().__init__(layer, shape)
        self.released = Released(
            self.window, causal=layer.causal, exact_windowsize=True, use_rotary_pos_emb=False, autopad=False
        )

    @property
    def multiple(self) -> int:
        return self.window

    def enter(self, x: Tensor) -> Tensor:
        return x

    def call(self, *operands: Tensor) -> Tensor:
        out: Tensor = self.released(*operands)
        return out

    def leave(self, out: Tensor) -> Tensor:
        return out
