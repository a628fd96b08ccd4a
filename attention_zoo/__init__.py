"""Compare, trust and take home long-context attention.

    import attention_zoo as zoo
    layer = zoo.build("longformer", dim=512, heads=8, causal=True, window=256)
    out = layer(x)                       # out.hidden [B, L, E]
    zoo.available()                      # ('bigbird', 'full', 'longformer', 'reformer', 'transformer_xl')
"""

from attention_zoo.contract import Abilities, Attention, Layer, Output, Source, Tokens, Unsupported, keep
from attention_zoo.registry import available, build

__all__ = [
    "Abilities", "Attention", "Layer", "Output", "Source", "Tokens", "Unsupported", "available", "build", "keep",
]  # fmt: skip
