"""How the processes of a run share its work, as conf/train.yaml says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from attention_zoo.options import Positive, Seconds
from attention_zoo.rules import OneOf

DATA = ("ddp", "fsdp")


@dataclass
class ParallelConfig:
    """`parallel` of conf/train.yaml. One process takes it, too, and the same config goes on with any number of them.

    Fields:
        data: ddp: every process holds the whole model | fsdp: each holds its share of every block (FSDP2).
        sequence: processes that share the tokens of a row; divides their number, the others share the rows.
        timeout_s: how long a process waits for the others before the run ends as lost.
        checkpoint: activations of a block are computed again in backward instead of kept.
        compile: blocks are compiled by torch.compile.
        copy_states: what rows carry from segment to segment is copied to all processes in each step (ddp), so that
            nothing of it is lost with one that dies.
    """

    data: Annotated[str, OneOf(*DATA)] = "ddp"
    sequence: Positive = 1
    timeout_s: Seconds = 600.0
    checkpoint: bool = False
    compile: bool = False
    copy_states: bool = True
