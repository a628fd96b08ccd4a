"""Measure how much context trained language models use: `python -m experiments.context --help`."""

from experiments import start

if __name__ == "__main__":
    start("context")
