"""Memory-compressed attention of the package of that name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Adapter, as_heads, as_rows, nothing, stand_in


class MemoryCompressedAttention(Adapter):
    """The module with its projections taken out; convolution and nulls are our layer's parameters."""

    title = "memory-compressed-attention"
    fair = (
        "Same compression, convolution and nulls on both sides. Its scale is that of the model's width: queries are "
        "multiplied by what is missing, one pass over them. It materialises L x L/c scores."
    )
    needs = "memory-compressed-attention>=0.0.7,<1"
    module = "memory_compressed_attention"
    backend = "memory_compressed"
    small: ClassVar[dict[str, Any]] = {"compression": 3}

    def __init__(self, layer: Any, shape: Shape):
        from memory_compressed_attention import MemoryCompressedAttention as Released

        if layer.kv_heads != layer.heads:
            raise Unsupported(self.title, "kv_heads", "its heads are not grouped", "kv_heads=null")
        self.compression = layer.compression
        super().__init__(layer, shape)
        dim = self.heads * self.width
        released = Released(dim, self.heads, layer.causal, self.compression)
        released.compress_fn.conv = layer.compress
        del released.null_k, released.null_v  # ours take their places in each call
        self.released, self.dim = released.to(shape.device, shape.dtype), dim
        (self.given,) = stand_in(self.released, "to_qkv")
        self.released.to_out = torch.nn.Identity()

    @property
    def multiple(self) -> int:
        return self.compression  # it fills up the first group, not the last

    def enter(self, x: Tensor) -> Tensor:
        return as_rows(x)

    def call(self, *operands: Tensor) -> Tensor:
        (q, k, v), layer = operands, self.layer
        self.released.null_k, self.released.null_v = (
            null.view(1, 1, self.dim) for null in (layer.null_key, layer.null_value)
        )
        self.given.tensor = torch.cat([q * (layer.scale * self.dim**0.5), k, v], -1)
        out: Tensor = self.released(nothing(q.shape[0], q.shape[1], self.dim, q))
        return out

    def leave(self, out: Tensor) -> Tensor:
        return as_heads(out, self.heads)
