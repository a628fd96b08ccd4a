"""What cannot be done by several processes, or not in a way that is asked for: said by name before anything trains."""

from __future__ import annotations

from torch import nn

from attention_zoo.model.norm import BatchNorm
from attention_zoo.model.reversible import ReversibleStack
from attention_zoo.parallel.config import ParallelConfig
from attention_zoo.parallel.world import World
from attention_zoo.rules import Unsupported


def refuse_compiled_states(options: ParallelConfig, carry: bool) -> None:
    """Raise Unsupported for blocks that are compiled and carry states: what a state keeps is planned on the host."""
    if options.compile and carry:
        raise Unsupported(
            "parallel.compile=true", "trainer.carry_state=true for this task and model",
            "what a state keeps is planned on the host", "trainer.carry_state=false, or parallel.compile=false",
        )  # fmt: skip


def refuse(model: nn.Module, options: ParallelConfig, world: World, precision: str) -> None:
    """Raise Unsupported for what does not go with these options, naming both and what does.

    Args:
        model: not yet changed.
        precision: of the run.
    """
    parts = list(model.modules())
    reversible = any(isinstance(part, ReversibleStack) for part in parts)
    if world.size > 1 and any(isinstance(part, BatchNorm) for part in parts):
        raise Unsupported(
            "norm=batch",
            "training in several processes",
            "each would keep statistics of its own rows",
            "norm=layer or norm=rms",
        )
    if options.checkpoint and reversible:
        raise Unsupported(
            "model.reversible", "parallel.checkpoint=true", "its backward computes everything again already",
            "parallel.checkpoint=false",
        )  # fmt: skip
    if options.compile and reversible:
        raise Unsupported(
            "model.reversible", "parallel.compile=true", "its blocks are run branch by branch", "parallel.compile=false"
        )
    if options.data != "fsdp" or world.size == 1:
        return
    if reversible:
        raise Unsupported(
            "model.reversible", "parallel.data=fsdp", "its backward runs branches by themselves, whose weights are "
            "shared out by then", "parallel.data=ddp, or parallel.checkpoint=true with model.reversible=false",
        )  # fmt: skip
    if precision == "float16":
        raise Unsupported(
            "trainer.precision=float16", "parallel.data=fsdp", "each process would scale its share of the gradients "
            "by itself", "trainer.precision=bfloat16, or parallel.data=ddp",
        )  # fmt: skip
    if any(getattr(part, "name", None) == "memory_tokens" for part in parts):
        raise Unsupported(
            "memory_tokens", "parallel.data=fsdp", "blocks run as often as a process's rows need, and all must gather "
            "their weights as often", "parallel.data=ddp",
        )  # fmt: skip
    scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
    if scalars:
        raise Unsupported(
            f"the parameter {scalars[0]}", "parallel.data=fsdp", "a single number cannot be shared out",
            "parallel.data=ddp",
        )  # fmt: skip
