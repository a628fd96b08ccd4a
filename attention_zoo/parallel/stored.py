"""Tensors of a run in a folder of safetensors files, each process writing its own, for any number to read.

By torch's distributed checkpoints over their safetensors storage, whose index is the headers of the files: nothing is
pickled, so that nothing is run when a folder is read. `state.json` beside the tensors holds all that is no tensor and
the SHA-256 of every file, itself included.

A folder is written beside its place and renamed to it: killed at any moment there is the old one, the new one, or the
old one under the name of the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint

from attention_zoo.files import write_json
from attention_zoo.locks import Names, owning
from attention_zoo.parallel.world import World, is_lost

STATE = "state.json"
FORMAT = "attention_zoo checkpoint of several processes 1"
RENAMES = Names(".renames", ".renamer.json")
"""Of who puts a folder in its place."""
RENAMED_S = 10.0
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.d")


class Unreadable(ValueError):
    """A folder that is no checkpoint, or a damaged one. One line: which, and what is wrong with it."""


def store(folder: Path, tensors: Mapping[str, Tensor], said: Mapping[str, Any], world: World, *, before: Path) -> None:
    """Write a folder, all processes together.

    Args:
        folder: that they all see.
        tensors: by name; a name that several have is the same tensor, or its shares.
        said: as JSON; that of the first process counts.
        before: where the folder goes that was there.
    """
    name = world.everybody.shared(f".{folder.name}.{secrets.token_hex(4)}.d")
    made = folder.with_name(name)
    try:
        world.by_first(lambda: made.mkdir(parents=True))
        writer = checkpoint.HuggingFaceStorageWriter(str(made), save_distributed=True)
        with _quiet(f"{folder} cannot be written"):
            checkpoint.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
        everybody = world.everybody
        files = world.by_first(lambda: sorted(path.name for path in made.glob("*.safetensors")))
        own = {each: digest(made / each) for each in files[everybody.rank :: everybody.size]}
        digests = {name: value for some in everybody.gathered(own) for name, value in some.items()}
        world.by_first(lambda: _finish(made, folder, before, {**said, "format": FORMAT, "files": digests}))
    except BaseException:
        if world.first:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _finish(made: Path, folder: Path, before: Path, said: dict[str, Any]) -> None:
    write_json(made / STATE, {**said, "digest": _digest_of(said)})
    old = made.with_name(f"{made.name[:-2]}0.d")
    # whoever outlives a process of the run may save at the same moment as another that has not heard of it yet
    with owning(folder.parent, names=RENAMES, wait_s=RENAMED_S, notice=lambda line: None):
        if folder.is_dir():
            if before.is_dir():
                os.replace(before, old)
            os.replace(folder, before)
        os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Folders in it that a killed process has left half written. Only for who owns it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def said_in(folder: Path, world: World) -> dict[str, Any]:
    """What is no tensor in a folder, each of whose files is whole.

    Raises:
        Unreadable: in every process, for a damaged or foreign folder.
    """
    found: dict[str, Any] = {}
    wrong: str | None = None
    try:
        found = _checked(folder, world.rank, world.size)
    except Unreadable as error:
        wrong = str(error)
    for each in world.everybody.gathered(wrong):
        if each is not None:
            raise Unreadable(each)
    return found


def _checked(folder: Path, rank: int, size: int) -> dict[str, Any]:
    path = folder / STATE
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{folder} is damaged: {STATE} cannot be read ({type(error).__name__})") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise Unreadable(f"{folder} is no checkpoint of several processes: {STATE} does not say so")
    if said.pop("digest", None) != _digest_of(said):
        raise Unreadable(f"{folder} is damaged: {STATE} does not match its digest")
    there = {each.name for each in folder.glob("*.safetensors")}
    if there != set(said["files"]):
        odd = sorted(there ^ set(said["files"]))[0]
        raise Unreadable(f"{folder} is damaged: {odd} {'is not its own' if odd in there else 'is missing'}")
    for name in sorted(said["files"])[rank::size]:
        if digest(folder / name) != said["files"][name]:
            raise Unreadable(f"{folder} is damaged: {name} does not match its digest")
    return said


def sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a folder."""
    with _quiet(f"{folder} cannot be read"):
        found = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(each.size), each.properties.dtype) for name, each in found.items()}  # type: ignore[union-attr]


def fetch(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors, or the shares of them that this process has, all processes together.

    Args:
        tensors: by name; each process may ask for others.
    """
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    with _quiet(f"{folder} cannot be read"):
        checkpoint.load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet(otherwise: str) -> Iterator[None]:
    """Without warnings: torch tells of a reader without a process group, which is meant, and of its own old parts.

    Raises:
        OSError: in every process, where one of them could not do its part.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except checkpoint.CheckpointException as error:  # of no kind that others catch
        first = next((each for each, _ in error.failures.values()), error)
        if isinstance(first, Exception) and is_lost(first):
            raise first from None
        text = " ".join(str(first).split())[:200]
        raise OSError(f"{otherwise}: {type(first).__name__}: {text}") from None
