"""Compare, trust and take home long-context attention.

import attention_zoo as zoo
layer = zoo.build("longformer", dim=512, heads=8, causal=True, window=256)
out = layer(x)                       # out.hidden [B, L, E]
zoo.available()                      # ('bigbird', 'full', 'longformer', 'reformer', 'transformer_xl')
"""

from attention_zoo.contract import Abilities, Attention, Layer, Output, Source, Tokens, Unsupported, keep
from attention_zoo.model import EncoderDecoder, Transformer, generate, load, save
from attention_zoo.registry import available, build

__all__ = [
    "Abilities", "Attention", "EncoderDecoder", "Layer", "Output", "Source", "Tokens", "Transformer", "Unsupported",
    "available", "build", "generate", "keep", "load", "save",
]  # fmt: skip
