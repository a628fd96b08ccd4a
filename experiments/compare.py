"""Measure and train every backend, in one report: `python -m experiments.compare --help`."""

from experiments import start

if __name__ == "__main__":
    start("compare")
