"""A checkpoint of several processes, which any number of them goes on from, one included; and one process's file, which
several go on from.

What is exact: the same number of processes goes on to the same bits, as one process does. Another number goes on from
the same weights, averages, place in the data and carried states; its sums are rounded otherwise, and its masks of
dropout are drawn for other rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo.files import plain
from attention_zoo.parallel import stored
from attention_zoo.parallel.world import World
from attention_zoo.training.checkpoint import (
    CheckpointError,
    OtherRun,
    check_like,
    foreign,
    load_checkpoint,
    pack,
    unpack,
)
from attention_zoo.training.fit import History
from attention_zoo.training.lifted import lifted, lowered, referred
from attention_zoo.training.seed import random_state, restore_random_state
from attention_zoo.training.shares import (
    Uneven,
    divided_anew,
    like,
    plain_of,
    room_for,
    take,
    tensors_of,
    weights_of,
)
from attention_zoo.training.trainer import Standing, Trainer

AFRESH = "carried states start afresh"


def save_folder(
    paths: tuple[Path, Path], identity: str, data: Any, trainer: Trainer, history: History, lines: int
) -> None:
    """Write the checkpoint, all processes together.

    Args:
        paths: of the newest folder, and of the one before it, which the newest so far becomes.
        identity, data, lines: as of `resume.save`; those of the first process count.
    """
    world = trainer.world
    tensors = tensors_of(trainer)
    own = [_lifted(pack(stream.state), f"carried.{world.rank}", tensors) for stream in trainer.streams]
    standing = Standing(trainer.batches.state_dict(), random_state(), None)
    said = _said(identity, data, trainer, history, lines, standing, world.everybody.gathered(own), tensors)
    stored.store(paths[0], tensors, said, world, before=paths[1])


def save_by_one(
    paths: tuple[Path, Path], identity: str, data: Any, trainer: Trainer, history: History, lines: int
) -> None:
    """The same by this process alone, which holds the whole model and knows what all carried: without the others.

    Args:
        paths, identity, data, lines: as of `save_folder`.
    """
    tensors, standing = tensors_of(trainer), trainer.standing()
    assert standing.carried is not None
    carried = [
        [_lifted(tree, f"carried.{rank}", tensors) for tree in parts]
        for rank, parts in enumerate(standing.carried.trees())
    ]
    said = _said(identity, data, trainer, history, lines, standing, carried, tensors)
    stored.store(paths[0], tensors, said, World(), before=paths[1])


def _said(
    identity: str,
    data: Any,
    trainer: Trainer,
    history: History,
    lines: int,
    standing: Standing,
    carried: list[list[Any]],
    tensors: dict[str, Tensor],
) -> dict[str, Any]:
    """What a folder says beside its tensors, which get those of the generators."""
    return {
        "identity": identity,
        "data": plain(data),
        "step": trainer.done,
        "processes": trainer.world.size,
        "sequence": trainer.world.sequence.size,
        "carried": carried,
        "random": _lifted(_own_device(standing.random), "random", tensors),
        "optimizer": plain_of(trainer),
        "scaler": trainer.precision.scaler.state_dict(),
        "batches": standing.batches,
        "history": history.state_dict(),
        "lines": lines,
    }


def load_folder(path: Path, identity: str, data: Any, trainer: Trainer, history: History, notes: list[str]) -> int:
    """Take up all that a folder holds, all processes together; its count of lines.

    Args:
        notes: gets a line for what cannot be taken up as it was.

    Raises:
        OtherRun: for a sound folder of another run.
        CheckpointError: for one that is damaged or none of ours.
    """
    try:
        said = stored.said_in(path, trainer.world)
    except stored.Unreadable as error:
        raise CheckpointError(str(error)) from None
    check_run(path, said["identity"], said["data"], identity, data)
    _check_state(trainer, said, path)
    sizes = stored.sizes(path)
    try:
        tensors = room_for(trainer, sizes, said["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    same = said["processes"] == trainer.world.size and len(said["carried"][0]) == len(trainer.streams)
    trees = said["carried"][trainer.world.rank] if same else said["carried"]
    for name in {*referred(trees), *referred(said["random"])}:
        shape, dtype = sizes[name]
        tensors[name] = torch.zeros(shape, dtype=dtype)
    stored.fetch(path, tensors, trainer.world)
    _finite(tensors, path, trainer.world)
    take(trainer, tensors, said["optimizer"])
    if same:
        carried = [lowered(tree, tensors) for tree in trees]
    else:
        whole = said["sequence"] == trainer.world.sequence.size == 1
        rows = [lowered(tree, tensors) for of_process in trees for tree in of_process]
        carried = _divided(rows if whole else None, trainer, notes)
    _go_on(trainer, history, said, carried, _random(lowered(said["random"], tensors)))
    return int(said["lines"])


def load_file(path: Path, identity: str, data: Any, trainer: Trainer, history: History, notes: list[str]) -> int:
    """The same of one process's file, in each of several processes."""
    content = load_checkpoint(path, identity)
    check_run(path, content["identity"], content.get("data"), identity, data)
    state = content["trainer"]
    said = {**content, **{name: state[name] for name in ("step", "scaler", "batches")}}
    _check_state(trainer, said, path)
    # by the order in which one process's optimizer has them
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    order = [names[id(parameter)] for parameter in trainer.order]
    averages = {order[index]: values for index, values in state["optimizer"]["state"].items()}
    whole: dict[str, Any] = {f"model.{name}": value for name, value in state["model"].items()}
    if whole.keys() != {f"model.{name}" for name in trainer.model.state_dict()}:
        raise CheckpointError(f"{path} holds other weights than this model has")
    whole = {name: whole[name] for name in weights_of(trainer)}
    for name, values in averages.items():
        whole |= {f"optimizer.{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    rest = {
        name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for name, values in averages.items()
    }
    try:
        tensors = room_for(trainer, {name: (tuple(v.shape), v.dtype) for name, v in whole.items()}, rest)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(like(whole[name], value))
    _finite(tensors, path, trainer.world)
    take(trainer, tensors, rest)
    same = trainer.world.size == 1 and len(state["carried"]) == len(trainer.streams)
    carried = state["carried"] if same else _divided(state["carried"], trainer, notes)
    _go_on(trainer, history, said, carried, content["random"])
    return int(content["lines"])


def check_run(path: Path, theirs: Any, their_data: Any, identity: str, data: Any) -> None:
    """Raise OtherRun for a checkpoint of another run, or of one over other data."""
    if theirs != identity:
        raise OtherRun(f"{path} belongs to run {theirs}, not to {identity}")
    if json.dumps(plain(their_data)) != json.dumps(data):
        raise OtherRun(f"{path} was trained on other data")


def _check_state(trainer: Trainer, said: dict[str, Any], path: Path) -> None:
    own = {"step": trainer.done, "scaler": trainer.precision.scaler.state_dict()}
    own["batches"] = trainer.batches.state_dict()
    for name, value in own.items():
        check_like(value, said[name], name, path)
    if said["step"] < 0:
        raise foreign(path, f"step must be at least 0, got {said['step']}")


def _finite(tensors: dict[str, Tensor], path: Path, world: World) -> None:
    """No step of ours leaves NaN or infinity behind."""
    wrong = [
        name
        for name, value in tensors.items()
        if name.startswith(("model.", "optimizer."))
        and value.is_floating_point()
        and not bool(getattr(value, "_local_tensor", value).isfinite().all())
    ]
    for each in world.everybody.gathered(wrong[:1]):
        if each:
            raise CheckpointError(f"{path}: {each[0]} holds NaN or infinity")


def _divided(trees: list[Any] | None, trainer: Trainer, notes: list[str]) -> list[Any]:
    """Carried states for this process's parts."""
    empty = [{"plain": None}] * len(trainer.streams)
    if trees is not None and all(tree == {"plain": None} for tree in trees if not isinstance(tree, Tensor)):
        return empty
    wrong, found = None, empty
    try:
        if trees is None:
            raise Uneven("processes shared the tokens of a row")
        found = divided_anew(trees, trainer.world, len(trainer.streams))
    except Uneven as error:
        wrong = str(error)
    reasons = [each for each in trainer.world.everybody.gathered(wrong) if each is not None]
    if reasons:
        notes.append(f"{AFRESH}, since another number of processes goes on and {reasons[0]}")
        return empty
    return found


def _go_on(trainer: Trainer, history: History, said: dict[str, Any], carried: list[Any], random: Any) -> None:
    trainer.precision.scaler.load_state_dict(said["scaler"])
    trainer.batches.load_state_dict(said["batches"])
    for stream, tree in zip(trainer.streams, carried, strict=True):
        stream.state = unpack(tree, trainer.device)
    trainer.done, trainer.carried = said["step"], None
    history.load_state_dict(said["history"])
    restore_random_state(random)


def _lifted(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    found: dict[str, Tensor] = {}
    made = lifted(tree, f"{name}.{sum(key.startswith(name + '.') for key in tensors)}", found)
    tensors |= found
    return made


def _own_device(state: dict[str, Any]) -> dict[str, Any]:
    """Of several devices of a machine each process has one, whose generator walks as the others'."""
    return state | {"cuda": state["cuda"][torch.cuda.current_device() :][:1] if state["cuda"] else []}


def _random(state: dict[str, Any]) -> dict[str, Any]:
    cuda = state["cuda"]
    if cuda and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda[0])
    return {**state, "cuda": []}
