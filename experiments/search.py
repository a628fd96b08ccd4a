"""Search for the options with which a model learns best: `python -m experiments.search --help`."""

from experiments import start

if __name__ == "__main__":
    start("search")
