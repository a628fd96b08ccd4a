"""Show what trained runs attend to on a text: `python -m experiments.inspect --help`."""

from experiments import start

if __name__ == "__main__":
    start("inspect")
