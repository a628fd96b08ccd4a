"""What a trained model attends to on a text: measured by its own kernels, pooled into blocks, never L x L."""
