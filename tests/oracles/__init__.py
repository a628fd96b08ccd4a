"""Our mechanisms against code that is not ours: outputs, gradients of the input and of every parameter.

Each file holds the cases of one mechanism; test_oracles.py holds them to their tolerances, and the largest errors of
all are printed by

    python -m tests.oracles.table

Nothing is downloaded: foreign modules are built from a config and run on our random weights.
"""
