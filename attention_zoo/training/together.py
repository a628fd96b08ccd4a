"""Where a run begins: its processes find one another, and one of them owns the folder for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from attention_zoo.files import remove_leftovers
from attention_zoo.locks import owning
from attention_zoo.options import check_fields
from attention_zoo.parallel.config import ParallelConfig
from attention_zoo.parallel.launched import launched
from attention_zoo.parallel.stored import remove_unfinished
from attention_zoo.parallel.world import World, joined
from attention_zoo.training.config import device_of


@contextmanager
def world_of(config: Mapping[str, Any]) -> Iterator[World]:
    """The processes that were launched to do a run.

    Args:
        config: as it was given; of what is wrong in it beside `device` and `parallel` the run itself tells.
    """
    found = launched()
    if found.size == 1:  # what is wrong with its device the run tells, in its row
        yield World()
        return
    wrong, device = None, "cpu"
    try:
        device = device_of(config.get("device", "auto"))
    except ValueError as error:  # it may be that of this machine alone, and the others wait: they are met and told
        wrong = error
    said = config.get("parallel")
    known = {field.name for field in fields(ParallelConfig)}
    options = ParallelConfig(**{key: said[key] for key in known & said.keys()} if isinstance(said, Mapping) else {})
    check_fields(ParallelConfig, options, "parallel.")
    with joined(device, sequence=options.sequence, timeout_s=options.timeout_s, found=found) as world:
        if wrong is not None:
            raise wrong
        yield world


@contextmanager
def folder_of(world: World, folder: Path, wait_s: float) -> Iterator[None]:
    """The first process, which alone writes rows, figures and models, owns a folder; see `locks.owning`."""
    with ExitStack() as kept:

        def own() -> None:
            kept.enter_context(owning(folder, wait_s=wait_s))
            remove_leftovers(folder)
            remove_unfinished(folder)

        world.by_first(own)
        yield
