"""The kernels of patterns: which keys a call sees, as tiles, blocks, masks or one row."""
