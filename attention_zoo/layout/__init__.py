"""What the tokens of a call are, found once: where they stand, what a query reaches, what is kept for later calls."""
