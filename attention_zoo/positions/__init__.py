"""Position schemes, one a file. Embedding-level ones add to the input once; attention-level ones enter each layer."""

from typing import Any

from attention_zoo.positions.alibi import Alibi
from attention_zoo.positions.axial import Axial
from attention_zoo.positions.learned import Learned
from attention_zoo.positions.rotary import Rotary
from attention_zoo.positions.scheme import AttentionPositions
from attention_zoo.positions.sinusoidal import Sinusoidal

ATTENTION_LEVEL: dict[str, type[AttentionPositions]] = {"none": AttentionPositions, "rotary": Rotary, "alibi": Alibi}
EMBEDDING_LEVEL: dict[str, Any] = {"sinusoidal": Sinusoidal, "learned": Learned, "axial": Axial}

__all__ = [
    "ATTENTION_LEVEL", "EMBEDDING_LEVEL", "Alibi", "AttentionPositions", "Axial", "Learned", "Rotary", "Sinusoidal",
]  # fmt: skip
