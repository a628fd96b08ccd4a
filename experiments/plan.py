"""Say on paper what each mechanism takes on several devices: `python -m experiments.plan --help`."""

from experiments import start

if __name__ == "__main__":
    start("plan")
