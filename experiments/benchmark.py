"""Measure time and memory of every backend over lengths, and beside peers: `python -m experiments.benchmark --help`."""

from experiments import start

if __name__ == "__main__":
    start("benchmark")
