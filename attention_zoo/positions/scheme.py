"""What an attention-level position scheme may do: turn queries and keys, or add to the scores. Default: neither."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.contract import Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.options import Heads, Positive, checked


class AttentionPositions(nn.Module):
    """No positions. Subclasses override `rotate` and `turn`, or `bias`; each must depend on differences alone."""

    has_bias = False
    rotates = False
    options: ClassVar[tuple[str, ...]] = ()
    """What may be given beside the name; all with defaults."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(prefix="positions.")(cls.__init__)  # type: ignore[method-assign]

    @checked
    def __init__(self, *, heads: Heads, head_width: Positive):
        super().__init__()
        self.heads, self.head_width = heads, head_width

    def rotate(self, x: Float[Tensor, "B ... L D"], position: Int[Tensor, "B L"]) -> Float[Tensor, "B ... L D"]:
        return x

    def turn(self, x: Float[Tensor, "B ... L D"], layout: Layout) -> Float[Tensor, "B ... L D"]:
        """`rotate` by the positions of a call's tokens; what follows from these alone is found once for all layers."""
        return x

    def bias(self, queries: Tokens, keys: Tokens, dtype: torch.dtype) -> Float[Tensor, "B H L S"]:
        """Finite addition to the scores, pairwise, in the layer's dtype; only called where `has_bias`."""
        raise NotImplementedError
