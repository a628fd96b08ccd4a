"""Train one model, or with -m a sweep of them: `python -m experiments.train --help`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from attention_zoo.training.config import plain, register
from attention_zoo.training.launch import launch
from attention_zoo.training.run import run_folder, run_training, show

register()
failed: list[Path] = []


@hydra.main(config_path="pkg://attention_zoo.conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    try:
        config = plain(composed, HydraConfig.get().runtime.choices.get("attention"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        failed.append(Path())  # refused: the rest of a sweep goes on
        return
    folder = run_folder(config)
    if not show(run_training(config, folder), folder):
        failed.append(folder)  # recorded: the rest of a sweep goes on


if __name__ == "__main__":
    launch(main)
    sys.exit(1 if failed else 0)
