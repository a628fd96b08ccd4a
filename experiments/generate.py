"""Write on from a prompt with a trained model: `python -m experiments.generate --help`."""

from experiments import start

if __name__ == "__main__":
    start("generate")
