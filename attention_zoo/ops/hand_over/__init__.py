"""A state that goes from one process to the next: what is sent, and how gradients come back."""
