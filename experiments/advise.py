"""Say which attention fits, sees, learns and costs what, from result rows: `python -m experiments.advise --help`."""

from experiments import start

if __name__ == "__main__":
    start("advise")
