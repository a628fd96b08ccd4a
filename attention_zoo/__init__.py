"""Compare, trust and take home long-context attention.

import attention_zoo as zoo
layer = zoo.build("longformer", dim=512, heads=8, causal=True, window=256)
out = layer(x)                       # out.hidden [B, L, E]
zoo.available()                      # ('bigbird', 'full', 'longformer', 'reformer', 'transformer_xl')
zoo.wrappers()                       # ('global_tokens',), which stand around these
"""

from attention_zoo.contract import Abilities, Attention, Layer, Output, Source, Tokens, Unsupported, keep
from attention_zoo.model import EncoderDecoder, Nested, Transformer, Wrapper, generate, load, save
from attention_zoo.registry import available, build, wrappers

__all__ = [
    "Abilities", "Attention", "EncoderDecoder", "Layer", "Nested", "Output", "Source", "Tokens", "Transformer",
    "Unsupported", "Wrapper", "available", "build", "generate", "keep", "load", "save", "wrappers",
]  # fmt: skip
