"""Which attention for which problem: a matrix and sentences from result rows, and nothing that rows do not carry."""
