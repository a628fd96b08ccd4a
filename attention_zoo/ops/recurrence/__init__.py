"""A recurrence over blocks: one turn, all turns, and the way back."""
