"""Columns that travel between the processes that own a sequence: by need, differentiable, counted."""
