"""Pretrained weights: checkpoints of transformers in our skeleton, and short models made long.

from attention_zoo.integrations import weights
model = weights.convert("roberta-base")               # a folder, or an id on the hub
"""

from attention_zoo.integrations.weights.convert import convert
from attention_zoo.integrations.weights.families import FAMILIES
from attention_zoo.integrations.weights.inputs import tokens_of

__all__ = ["FAMILIES", "convert", "tokens_of"]
