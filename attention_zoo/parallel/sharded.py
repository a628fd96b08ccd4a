"""FSDP2: every process holds its share of each block, and has the whole block while it computes it.

Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`. Four things are ours:

- A parameter that blocks share (Transformer-XL's u and v over depth) can belong to no block: it is the root's, which
  holds it for a whole pass. Sharing is found by identity.
- What is read outside of a forward (spans that are clamped after a step, a memory that a state begins with) is whole
  in every process, and its gradients are summed here. These are a few numbers for each head or token.
- torch reduces a block's gradients as one piece and takes for granted that every process has the same ones. What a row
  needs may depend on the row (projections of global tokens): a parameter that some process needs gets a gradient of
  zeros in the others, and one that none needs gets none anywhere, as in one process.
- All must run the same blocks in the same order. Within an hourglass that a stream is read with, blocks run where a
  group opens: then everywhere, if need be on padding (`Level.always_inside`).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from attention_zoo.model.block import Block
from attention_zoo.model.level import Beside, Level
from attention_zoo.model.wrapper import Wrapper
from attention_zoo.parallel.world import Team, World

HOLDER = "shared_by_blocks"
"""A name in the model while it is shared out, and at no other time."""


def shard(model: nn.Module, world: World) -> Whole:
    """Share out the parameters of a model among all processes, in place. Its names stay.

    Args:
        model: on its device, with the same weights in every process.

    Returns:
        its parameters as they are while they are whole.
    """
    # blocks hand states on, some of which are views; nobody writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    blocks = {name: part for name, part in model.named_modules() if isinstance(part, Block)}
    for part in model.modules():
        if isinstance(part, Level):
            part.always_inside = True
    kept = kept_whole(model)
    shared = shared_parameters(model, list(blocks.values())) - kept
    whole = Whole(model, kept)
    for name, block in blocks.items():
        whole.follow(name, block)  # before torch's own, which shares out again
        fully_shard(block, mesh=mesh, ignored_params=shared | kept)
    whole.follow("", model)
    # the root takes what it owns itself: for so long it owns what blocks share
    holder = nn.Module()
    for number, parameter in enumerate(shared):
        holder.register_parameter(str(number), parameter)
    model.add_module(HOLDER, holder)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    delattr(model, HOLDER)
    return whole


def shared_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Those that stand in more than one block, or in a block and outside of all."""
    within = {module for block in blocks for module in block.modules()}
    owners: Counter[nn.Parameter] = Counter(parameter for block in blocks for parameter in block.parameters())
    outside = {p for module in model.modules() if module not in within for p in module.parameters(recurse=False)}
    return {parameter for parameter, count in owners.items() if count > 1 or parameter in outside}


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Those that are read outside of a forward: a module's own, where it has `after_step` or `readings` (see
    `training.following`), or is a wrapper whose state begins with something of its own."""
    found = set[nn.Parameter]()
    for module in model.modules():
        begins = isinstance(module, Wrapper) and type(module).own_state is not Wrapper.own_state
        if begins or hasattr(module, "after_step") or hasattr(module, "readings"):
            found |= set(module.parameters(recurse=False))
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are shared out."""
    return isinstance(model, FSDPModule)


class Whole:
    """The parameters of a model in one process as its last forward had them.

    Args:
        model: whose parameters are shared out.
        kept: those that are never.
    """

    def __init__(self, model: nn.Module, kept: set[nn.Parameter]) -> None:
        self.model, self.kept = model, kept
        self.found: dict[str, nn.Parameter] = {}
        self.needed: set[str] = set()

    def follow(self, name: str, module: nn.Module) -> None:
        """Note those of a part whenever it has computed."""

        def note(module: nn.Module, _given: Any, _output: Any) -> None:
            if torch.is_grad_enabled():
                for own, parameter in module.named_parameters(prefix=name):
                    if parameter.requires_grad and not isinstance(parameter, DTensor):
                        self.found[own] = parameter

        module.register_forward_hook(note)

    def completed(self, loss: Tensor, team: Team) -> Tensor:
        """The same loss, which besides gives zeros to those parameters that only other processes' losses need."""
        needed = _leaves(loss)
        names = sorted(self.found)
        here = torch.tensor([id(self.found[name]) in needed for name in names], dtype=torch.int32)
        anywhere = team.sum(here.clone()) > 0
        self.needed.update(name for name, needs in zip(names, anywhere.tolist()) if needs)
        missing = [self.found[name] for name, lacks in zip(names, (anywhere & (here == 0)).tolist()) if lacks]
        return _Completed.apply(loss, *missing) if missing else loss

    def reduce(self, team: Team) -> None:
        """The mean over all processes for the gradients that torch leaves to us, as it makes for the others; and none
        for what was computed for others' sake alone, which they did not need either."""
        for name, parameter in self.model.named_parameters():
            if name in self.found and name not in self.needed:
                parameter.grad = None
        self.needed.clear()
        for name in sorted(self.found):
            if self.found[name] in self.kept and (grad := self.found[name].grad) is not None:
                grad.copy_(team.sum(grad.clone()) / team.size)

    def norm(self, parameters: Sequence[Tensor], limit: float) -> float:
        """As `torch.nn.utils.clip_grad_norm_`, of tensors that are shared out and of some that are not."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shares = [grad for grad in grads if isinstance(grad, DTensor)]
        others = [grad for grad in grads if not isinstance(grad, DTensor)]
        found: Any = torch.nn.utils.get_total_norm(shares)
        norm = math.hypot(float(found.full_tensor()), float(torch.nn.utils.get_total_norm(others)))
        factor = min(1.0, limit / (norm + 1e-6))
        for grad in grads:
            grad.mul_(factor)
        return norm


class _Completed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        # their values are gone by now: where they would lie is known
        ctx.like = [(each.shape, each.dtype, each.device) for each in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _leaves(loss: Tensor) -> set[int]:
    """Identities of all tensors that the loss depends on; see `Beside`."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen or getattr(node, "_forward_cls", None) is Beside:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        left += [each for each, _ in node.next_functions]
    return found


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A stretch in which every process has the whole model, which nobody changes meanwhile."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Names and whole tensors, in every process; of a model that is not shared out its own."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }


def apart(optimizer: torch.optim.Optimizer) -> None:
    """Groups of an optimizer in which no tensor that is shared out stands beside one that is not: torch moves all of a
    group at once, and takes either."""
    for group in list(optimizer.param_groups):
        others = [each for each in group["params"] if not isinstance(each, DTensor)]
        if others and len(others) < len(group["params"]):
            group["params"] = [each for each in group["params"] if isinstance(each, DTensor)]
            optimizer.param_groups.append({**group, "params": others})
