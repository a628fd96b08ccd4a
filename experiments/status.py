"""Show how far sweeps, comparisons and benchmarks are: `python -m experiments.status --help`."""

from experiments import start

if __name__ == "__main__":
    start("status")
