"""Whether runs can be trained at all: their tasks and models are built, and nothing is written.

A model reads one row where the task draws its rows; text is not read, which takes longer than all else here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attention_zoo.training.building import build
from attention_zoo.training.checking import check_task
from attention_zoo.training.config import check, options_of
from attention_zoo.training.models import mechanism_of, model_of
from attention_zoo.training.objective import objective_of
from attention_zoo.training.seed import contained
from attention_zoo.training.streams import Stream


def impossible(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name -> why its task or model is refused, in one line; those that can be trained are left out.

    Args:
        configs: composed conf/train.yaml as plain values, by name.
    """
    found = {}
    for name, config in configs.items():
        with contained():
            try:
                options = options_of(check(config))
                task = build(options.task, "task")
                check_task(task)
                model = model_of(options, mechanism_of(options), task, objective_of(task))
                if (row := task.sample(options.seq_len)) is not None:
                    with torch.no_grad():
                        Stream(model, carry=False)(row)
            except (ValueError, NotImplementedError) as error:
                found[name] = " ".join(str(error).split())
            except Exception:  # of other people's code, or of this machine: the run says so, in its row
                continue
    return found
