"""How long a training step of a run takes, before the run is begun."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from attention_zoo.training.assembly import assemble
from attention_zoo.training.building import build
from attention_zoo.training.config import check, options_of
from attention_zoo.training.models import mechanism_of
from attention_zoo.training.seed import contained, seed_all

WARMUP = 1


def timed_steps(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Seconds of each of a run's first steps after `WARMUP`; nothing is written.

    Args:
        config: composed conf/train.yaml as plain values.
        steps: how many to time.

    Returns:
        {"seconds": [...]}, or {"error": why there are none}.
    """
    with contained():
        try:
            options = options_of(check(config))
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            seed_all(options.seed)
            task = build(options.task, "task")
            task.check(options.seq_len)
            trainer = assemble(options, mechanism_of(options), task).trainer
            seconds = []
            for _ in range(WARMUP + steps):
                began = time.perf_counter()
                trainer.step()
                if trainer.device != "cpu":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            return {"seconds": seconds[WARMUP:]}
        except (ValueError, ArithmeticError, NotImplementedError, RuntimeError) as error:  # the run will say so
            return {"error": " ".join(str(error).split())}
