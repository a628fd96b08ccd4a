"""What rows carry travels as one buffer, and comes out as it went in."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attention_zoo.training.checkpoint import unpack
from attention_zoo.training.copies import nothing_carried
from tests.processes import together


class Kept(NamedTuple):
    """A state of a mechanism's."""

    keys: Tensor
    count: int
    inner: Any


def states(rank: int, step: int) -> list[Any]:
    """Of two parts, of another size in each process and step; a tensor that lies otherwise in memory, a sequence that
    stands twice, an empty tensor, booleans, no state."""
    drawn = torch.Generator().manual_seed(10 * step + rank)
    keys = torch.randn(2, 3 + 5 * rank * step, 4, generator=drawn, dtype=torch.float64)
    shared = [torch.arange(rank + step) > 1, {"a": torch.empty(0, 3)}]
    return [Kept(keys.transpose(0, 1), rank, (shared, shared)), None]


def exchanged(steps: int) -> list[str]:
    """In each of several processes: what is wrong with what came, step by step."""
    from torch import distributed as there

    from attention_zoo.parallel.world import Team
    from attention_zoo.training.copies import Copies

    rank, size = there.get_rank(), there.get_world_size()
    copies, wrong, copied = Copies(Team(rank, size, there.group.WORLD)), [], []
    for step in range(steps):
        copies.begin(states(rank, step))
        copied.append(copies.end())
    for step, each in enumerate(copied):  # also what came first is as it came
        for other, trees in enumerate(each.trees()):
            for tree, wanted in zip(trees, states(other, step), strict=True):
                found = unpack(tree)
                wrong += [f"{step} {other}: {found}"] if not same(found, wanted) else []
    said: list[Any] = [None] * size
    there.all_gather_object(said, wrong)
    return [line for lines in said for line in lines]


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return (
            found.dtype == wanted.dtype
            and torch.equal(found, wanted)
            and (found.stride() == wanted.stride() or not wanted.numel())
        )
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, list | tuple):
        return type(found) is type(wanted) and all(map(same, found, wanted)) and len(found) == len(wanted)
    return bool(found == wanted)


@pytest.mark.parametrize("size", [2, 3])
def test_states_of_all_processes_are_in_each(size: int) -> None:
    assert together(size, "tests.test_parallel_copies:exchanged", 4) == []


def test_of_nothing_there_is_nothing_of_each_part() -> None:
    assert [[unpack(tree) for tree in trees] for trees in nothing_carried(3, 2).trees()] == [[None, None]] * 3
