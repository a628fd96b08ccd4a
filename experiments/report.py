"""Draw a report from results, without running anything: `python -m experiments.report --help`."""

from experiments import start

if __name__ == "__main__":
    start("report")
