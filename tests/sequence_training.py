"""Training steps of runs whose tokens several processes share, beside the same in one. Runs in each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from attention_zoo.parallel.launched import launched
from attention_zoo.parallel.world import World, joined
from attention_zoo.training.config import check, compose_training
from tests.parallel_processes import TINY, steps

WORDS = (*TINY, "seq_len=64", "batch=4", "trainer.carry_state=false")
TEXT = ("task=text", "task.evaluation_rows=2", "task.max_bytes=200000", "task.held_out=null")


def trained(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each case {words, sequence, count}: what one process finds, what this one finds, or why not."""
    size, rank = dist.get_world_size(), dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # a group is there already
    found = []
    for case in cases:
        own = any(word.startswith("task=") for word in case["words"])
        words = [*WORDS, *(() if own else TEXT), *case["words"]]
        said: dict[str, Any] = {}
        try:
            many = check(compose_training([*words, f"parallel.sequence={case['sequence']}"]))
            with joined("cpu", sequence=case["sequence"], timeout_s=60, found=launched()) as world:
                said["many"] = steps(many, world, dtype=case["dtype"], count=case["count"])
            one = check(compose_training(words))
            said["one"] = steps(one, World(), dtype=case["dtype"], count=case["count"])
        except (ValueError, NotImplementedError) as error:
            said["refused"] = str(error)
        found.append(said)
    return found
