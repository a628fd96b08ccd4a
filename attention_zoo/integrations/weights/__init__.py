"""Pretrained weights: checkpoints of transformers in our skeleton, and short models made long.

from attention_zoo.integrations import weights
model = weights.convert("roberta-base")               # a folder, or an id on the hub
"""

from attention_zoo.integrations.weights.convert import convert
from attention_zoo.integrations.weights.families import FAMILIES

__all__ = ["FAMILIES", "convert"]
