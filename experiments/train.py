"""Train one model, or with -m a sweep of them: `python -m experiments.train --help`."""

from experiments import start

if __name__ == "__main__":
    start("train")
