"""Measure time and memory of every backend over lengths, and beside peers: `python -m experiments.benchmark --help`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from attention_zoo.measure.config import register
from attention_zoo.report.benchmark import benchmark
from attention_zoo.settings import settings

register()


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="benchmark")
def main(composed: DictConfig) -> None:
    try:
        benchmark(settings(composed))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
