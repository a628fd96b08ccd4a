"""Position schemes, one a file. Embedding-level ones add to the input once; attention-level ones enter each layer."""

from attention_zoo.positions.alibi import Alibi
from attention_zoo.positions.rotary import Rotary
from attention_zoo.positions.scheme import AttentionPositions

ATTENTION_LEVEL: dict[str, type[AttentionPositions]] = {"none": AttentionPositions, "rotary": Rotary, "alibi": Alibi}

__all__ = ["ATTENTION_LEVEL", "Alibi", "AttentionPositions", "Rotary"]
