"""A pretrained checkpoint as files: config.json and tensors by name, from a folder or from the Hugging Face hub.

safetensors first, whole or in shards; otherwise PyTorch files through `torch.load(weights_only=True)`. Nothing is ever
unpickled beyond tensors, and no code of the checkpoint runs. Whatever is wrong with the files is one clear line.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attention_zoo.hub import silent

WHOLE = ("model.safetensors", "pytorch_model.bin")
"""Names of files with all tensors. With `.index.json` behind it, the table of a sharded checkpoint."""


class Checkpoint(NamedTuple):
    """What was found.

    Fields:
        folder: where the files lie.
        config: of config.json.
        tensors: by name; read when asked for.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


def read_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find config and tensors of a checkpoint.

    Args:
        source: a folder, or the id of a model on the Hugging Face hub ("gpt2", "allenai/longformer-base-4096").
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: where the folder, the model on the hub or one of the files is missing.
        ValueError: for a damaged file, or one that holds other things than tensors.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        find: Callable[[str], Path | None] = lambda name: found if (found := folder / name).is_file() else None  # noqa: E731
    else:
        find = _on_the_hub(str(source), revision)
    config = find("config.json")
    if config is None:
        raise FileNotFoundError(f"{source}: holds no config.json")
    for name in WHOLE:
        if (path := find(name)) is not None:
            return Checkpoint(config.parent, _read_json(config), _Tensors({path: None}))
        if (path := find(f"{name}.index.json")) is not None:
            return Checkpoint(config.parent, _read_json(config), _Tensors(_shards(path, find)))
    raise FileNotFoundError(f"{source}: holds neither {' nor '.join(WHOLE)}, whole or with an index of shards")


def _on_the_hub(name: str, revision: str | None) -> Callable[[str], Path | None]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and not the name of a model on the hub either")
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such folder; to fetch it from the hub, pip install 'attention-zoo[huggingface]'"
        ) from None

    def find(file: str) -> Path | None:
        try:
            with silent():
                if try_to_load_from_cache(name, file, revision=revision) is None:
                    get_hf_file_metadata(hf_hub_url(name, file, revision=revision))  # asked once: a download tries long
                return Path(hf_hub_download(name, file, revision=revision))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                return None
            raise FileNotFoundError(f"{name}: no such folder, and the hub cannot be reached for {file}") from None
        except RepositoryNotFoundError:
            raise FileNotFoundError(f"{name}: no such folder, and no such model on the hub") from None
        except Exception as error:  # of the system, of the hub's library, or of that which it reaches the hub by
            if isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "requests.")):
                raise FileNotFoundError(f"{name}: no such folder, and the hub cannot be reached for {file}") from None
            reason = str(error).partition("\n")[0]
            raise FileNotFoundError(f"{name}: {file} cannot be fetched from the hub: {reason}") from None

    return find


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def _shards(index: Path, find: Callable[[str], Path | None]) -> dict[Path, Iterable[str] | None]:
    """The files of an index, each with the names that it must hold."""
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index}: has no weight_map")
    named: dict[str, list[str]] = {}
    for name, file in table.items():
        # a path could lead anywhere
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} must lie in a file beside the index, got {file!r}")
        named.setdefault(file, []).append(name)
    shards: dict[Path, Iterable[str] | None] = {}
    for file, names in named.items():
        if (path := find(file)) is None:
            raise FileNotFoundError(f"{index}: the shard {file} is missing")
        shards[path] = names
    return shards


class _Tensors(Mapping[str, Tensor]):
    """Tensors of some files by name; those of safetensors are read when asked for.

    Args:
        files: each with the names that it must hold, None for whatever it holds.
    """

    def __init__(self, files: Mapping[Path, Iterable[str] | None]):
        self._readers: dict[str, Callable[[str], Tensor]] = {}
        for path, expected in files.items():
            names, read = _open(path)
            if lacking := sorted(set(expected or ()) - set(names)):
                raise ValueError(f"{path}: lacks {', '.join(lacking[:5])} and so on, which the index puts there")
            self._readers.update(dict.fromkeys(names, read))

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name](name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _open(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Names in a file, and what reads one."""
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, "pt")
            return list(file.keys()), file.get_tensor
        except SafetensorError as error:
            raise ValueError(f"{path}: not readable as safetensors: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not readable, or holds more than tensors, and is not trusted: {reason}") from None
    except Exception as error:  # of any kind: its reader runs over whatever bytes there are
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not readable as a PyTorch file: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: must hold a table of tensors by name, and nothing else")
    return list(found), found.__getitem__
