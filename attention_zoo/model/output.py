"""What a model returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor


class ModelOutput(NamedTuple):
    """What a model returns.

    Fields:
        logits: [B, L, V] (lm), [B, L, C] (tokens), [B, C] (classify), `PretrainingLogits`, or None (hidden).
        hidden: [B, L, E], after the last norm; finite at padding. 2E wide with `reversible="both"`.
        state: None in, None out.
        losses: auxiliary losses by name, weighted already.
    """

    logits: Any
    hidden: Float[Tensor, "B L E"]
    state: Any
    losses: dict[str, Tensor]
