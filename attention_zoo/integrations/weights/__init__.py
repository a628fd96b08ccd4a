"""Pretrained weights: checkpoints of transformers in our skeleton, and short models made long.

from attention_zoo.integrations import weights
model = weights.convert("roberta-base")                                  # a folder, or an id on the hub
long = weights.lengthen(model, attention="longformer", max_length=4096)
"""

from attention_zoo.integrations.weights.convert import convert, open_model
from attention_zoo.integrations.weights.families import FAMILIES
from attention_zoo.integrations.weights.inputs import tokens_of
from attention_zoo.integrations.weights.lengthen import lengthen

__all__ = ["FAMILIES", "convert", "lengthen", "open_model", "tokens_of"]
