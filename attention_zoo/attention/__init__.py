"""One mechanism a file. pattern.py is the shared base of those that are a pattern on queries, keys and values."""

from attention_zoo.attention.pattern import PatternAttention

__all__ = ["PatternAttention"]
