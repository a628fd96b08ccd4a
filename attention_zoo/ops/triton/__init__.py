"""What our Triton kernels need of a card, compiled ahead of time without one: see `ahead`, `compiled.csv`, `card`."""
