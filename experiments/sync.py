"""Send to W&B what it lacks, from our own files: `python -m experiments.sync --help`."""

from experiments import start

if __name__ == "__main__":
    start("sync")
