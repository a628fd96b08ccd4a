"""Attention with Transformer-XL's relative positions, in chunks."""
