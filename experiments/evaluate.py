"""Score a language model on text: `python -m experiments.evaluate --help`."""

from experiments import start

if __name__ == "__main__":
    start("evaluate")
