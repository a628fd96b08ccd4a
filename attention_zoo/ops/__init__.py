"""Fast primitives on [B, H, L, D] tensors: no modules, no configuration."""
