"""LSH attention of the package reformer-pytorch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Adapter


class ReformerPytorch(Adapter):
    """LSHAttention at its defaults, but for chunk, rounds, causality and dropout."""

    title = "reformer-pytorch"
    fair = (
        "Same rounds and chunks, one chunk back, hashing included on both sides; its buckets are L/chunk, half of ours "
        "at powers of two, and it looks back over the border of rounds (equal under wrap=reference)."
    )
    needs = "reformer-pytorch>=1.4.4,<2"
    module = "reformer_pytorch"
    backend = "reformer"
    operands = "qk v"
    small: ClassVar[dict[str, Any]] = {"chunk": 4, "rounds": 2, "wrap": "reference"}
    bound = 1e-7  # a token that sees only itself: its -5e4 costs digits

    def __init__(self, layer: Any, shape: Shape):
        from reformer_pytorch import LSHAttention

        if (layer.look_back, layer.look_ahead) != (1, 0):
            raise Unsupported(self.title, "look_back, look_ahead", "it looks one chunk back", "1 and 0")
        self.chunk = layer.chunk
        super().__init__(layer, shape)
        self.released = LSHAttention(
            bucket_size=self.chunk,
            n_hashes=layer.rounds,
            causal=layer.causal,
            attend_across_buckets=layer.attend_across_buckets,
            allow_duplicate_attention=not layer.correct_duplicates,
        )
        self.buckets: Tensor | None = None

    @property
    def multiple(self) -> int:
        return 2 * self.chunk

    def enter(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)  # heads are rows of the batch

    def call(self, *operands: Tensor) -> Tensor:
        out, _, self.buckets = self.released(*operands)
        hidden: Tensor = out
        return hidden

    def leave(self, out: Tensor) -> Tensor:
        return out.unflatten(0, (self.shape.batch, self.heads))

    def ours(self, *given: Tensor) -> Tensor:
        """With the buckets that theirs has just drawn."""
        assert self.buckets is not None
        rounds = self.layer.rounds
        buckets = self.buckets.view(self.shape.batch, self.heads, rounds, self.length)
        buckets = buckets - self.length // self.chunk * torch.arange(rounds)[:, None]  # theirs count through
        out: Tensor = self.layer.attend(*given, choices=buckets[..., None].int())
        return out
