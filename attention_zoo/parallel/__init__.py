"""A run on more than one process: who they are, what each computes, and how they say the same."""
