"""Exact softmax attention in parts: what every kernel is made of, whatever decides which keys are seen."""
