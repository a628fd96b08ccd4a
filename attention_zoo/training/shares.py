"""Where a run of several processes stands: what each holds of it, put together, and taken up again by any number.

| | in the folder | another number of processes |
|---|---|---|
| weights, the optimizer's averages | by the parameters' names, whole or in shares | each reads its shares |
| generators | once: all walk in step | the same |
| carried states | by process and part of its rows | put together and divided anew by rows |

A carried state that cannot be divided anew (processes stood at different lengths) starts afresh, and the run says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from attention_zoo.parallel.world import World
from attention_zoo.training.trainer import Trainer

NEW = "optimizer"
"""What the names of an optimizer's tensors begin with."""


class Uneven(ValueError):
    """Carried states that cannot be put together."""


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and the optimizer's tensors by name, each as this process has it."""
    found = weights_of(trainer)
    for name, parameter in trained(trainer):
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{NEW}.{name}.{key}"] = value
    return found


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """The model's tensors, each once: one that has several names has the first of them."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, value in trainer.model.state_dict(keep_vars=True).items():
        once.setdefault(id(value), (f"model.{name}", value.detach()))
    return dict(once.values())


def plain_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What the optimizer keeps of its parameters that is no tensor, and which have something at all."""
    return {
        name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for name, parameter in trained(trainer)
        if (state := trainer.optimizer.state.get(parameter))
    }


def trained(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters with their names, each once."""
    return trainer.model.named_parameters()


def room_for(
    trainer: Trainer, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], plain: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Tensors like those of a folder, each as this process shall have it: weights are those of the model, the
    optimizer's are new ones.

    Args:
        sizes: of the tensors there.
        plain: what else its optimizer had.

    Raises:
        ValueError: naming what this run has and the folder lacks, or the other way round, or in another shape.
    """
    model = weights_of(trainer)
    own = {name: (tuple(value.shape), value.dtype) for name, value in model.items()}
    theirs = {name: size for name, size in sizes.items() if name.startswith("model.")}
    for name in sorted({*own, *theirs}):
        if own.get(name) != theirs.get(name):
            said = [f"{each[0]} {each[1]}" if each else "nothing" for each in (theirs.get(name), own.get(name))]
            raise ValueError(f"{name.removeprefix('model.')} is {said[0]}, this model needs {said[1]}")
    parameters = dict(trained(trainer))
    found = dict(model)
    for name, (shape, dtype) in sizes.items():
        if not name.startswith(f"{NEW}."):
            continue
        of, _, key = name.removeprefix(f"{NEW}.").rpartition(".")
        parameter = parameters.get(of)
        if parameter is None or of not in plain or (shape and shape != tuple(parameter.shape)):
            raise ValueError(f"{key} of the optimizer is of {of} in shape {shape}, which this run does not train")
        # a number beside its parameter, such as the count of its steps, is on the host
        found[name] = torch.zeros_like(parameter, dtype=dtype) if shape else torch.zeros((), dtype=dtype)
    return found


def take(trainer: Trainer, tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]) -> None:
    """Go on with the optimizer's tensors, and with the weights, which have been filled in place."""
    trainer.optimizer.state.clear()
    for name, parameter in trained(trainer):
        if name in plain:
            start = f"{NEW}.{name}."
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            trainer.optimizer.state[parameter] = {**own, **plain[name]}


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as this process has its own: whole, or its share, on the same device."""
    if not isinstance(own, DTensor):
        return value.to(own.device)
    moved = value.to(own.device)
    # every process has all of it: nobody needs to be asked
    return distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)


def divided_anew(trees: list[Any], world: World, parts: int) -> list[Any]:
    """Carried states of all rows, in the order of the rows, as those of this process's parts.

    Args:
        trees: as `checkpoint.pack` gave them, of as many rows each.
        parts: of this process's rows.

    Raises:
        Uneven: where they cannot be put together, or cut so.
    """
    whole = _joined(trees)
    count = world.data.size * parts
    return [_cut(whole, world.data.rank * parts + index, count) for index in range(parts)]


def _joined(trees: list[Any]) -> Any:
    first = trees[0]
    if len(trees) == 1:
        return first
    if any(type(each) is not type(first) for each in trees):
        raise Uneven("they are built differently")
    if isinstance(first, Tensor):
        if len({(each.shape[1:], each.dtype) for each in trees}) > 1 or not first.ndim:
            raise Uneven("they are of different lengths")
        return torch.cat(trees)
    if isinstance(first, list):
        if len({len(each) for each in trees}) > 1:
            raise Uneven("they are built differently")
        return [_joined(list(each)) for each in zip(*trees)]
    if isinstance(first, dict):
        if any(each.keys() != first.keys() for each in trees):
            raise Uneven("they are built differently")
        return {key: _joined([each[key] for each in trees]) for key in first}
    if any(each != first for each in trees):
        raise Uneven("they are at different places")
    return first


def _cut(tree: Any, index: int, count: int) -> Any:
    if isinstance(tree, Tensor):
        if not tree.ndim or len(tree) % count:
            raise Uneven(f"{len(tree) if tree.ndim else 'one'} rows are not {count} equal parts")
        size = len(tree) // count
        return tree[index * size : (index + 1) * size].clone()
    if isinstance(tree, list):
        return [_cut(each, index, count) for each in tree]
    if isinstance(tree, dict):
        return {key: _cut(each, index, count) for key, each in tree.items()}
    return tree
