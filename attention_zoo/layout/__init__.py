"""What the tokens of a call are, found once: where they stand, how far a query reaches, what is kept for later calls."""
