"""What our Triton kernels need of a card, compiled ahead of time and without one: see `ahead`, `compiled.csv`, `card`."""
