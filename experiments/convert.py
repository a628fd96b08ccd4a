"""Convert a pretrained checkpoint, and make it long if asked: `python -m experiments.convert --help`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from attention_zoo.integrations.weights.commands import register, run_convert
from attention_zoo.settings import settings
from attention_zoo.training.launch import launch

register()


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="convert")
def main(composed: DictConfig) -> None:
    try:
        run_convert(settings(composed))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    launch(main)
