"""Compare every backend: cost over length, quality on real text and recall, one report.

python -m experiments.compare --help
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from attention_zoo.report.compare import compare, register
from attention_zoo.settings import settings
from attention_zoo.training.launch import launch

register()


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="compare")
def main(composed: DictConfig) -> None:
    try:
        compare(settings(composed))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    launch(main)
