"""Convert a pretrained checkpoint, and make it long if asked: `python -m experiments.convert --help`."""

from experiments import start

if __name__ == "__main__":
    start("convert")
