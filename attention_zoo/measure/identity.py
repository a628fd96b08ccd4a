"""What makes two results the same result: the config that matters, the code, torch, the device and the threads.

A finished identity is skipped, a result from other code is stale and is run again. The clock plays no part.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

COSMETIC = frozenset(
    {"tracker", "progress", "out", "output", "output_dir", "folder", "force", "retry", "dry", "hydra"}
    | {"trainer.progress", "trainer.ahead", "parallel.timeout_s", "parallel.copy_states"}
)
"""Keys (dotted where nested) that change where a result goes or how it is shown, never what it is."""

UNSEEN = frozenset({"report", "jobs", "tracking", "testing", "integrations"})
"""Subpackages that no figure depends on: editing a chart must not throw measurements away."""


def identity(config: Mapping[str, Any], *, device: str, threads: int) -> str:
    """A short name for a result: equal for equal work, different as soon as anything that matters differs.

    Args:
        config: plain nested mappings, lists and scalars; keys in `COSMETIC` do not count, nor does their order.
        device: "cpu", or the kind of accelerator ("cuda", or better its name: an H100 is no laptop).
        threads: intra-op threads of torch.

    Returns:
        16 hexadecimal digits.

    Raises:
        TypeError: for a value that JSON cannot hold, naming it.
    """
    parts = {
        "config": _plain(config, ""),
        "source": source_digest(),
        "torch": torch.__version__,
        "device": device,
        "threads": threads,
    }
    return _short(json.dumps(parts, sort_keys=True).encode())


@cache
def source_digest() -> str:
    """Digest of the code behind every figure: the package's Python files and the default options of its backends.

    Of conf/ only the backends' defaults count, since every other yaml reaches a result as values of its config.
    Read once per process: what is running is what was imported.

    Returns:
        16 hexadecimal digits, the same in a checkout and in an installed wheel.
    """
    package = Path(str(resources.files("attention_zoo")))
    defaults = Path(str(resources.files("attention_zoo.conf"))) / "attention"
    return _digest([*_files(package, "py"), *_files(defaults, "yaml")])


def class_digest(cls: type) -> str | None:
    """Digest of the file that defines a class outside this package (a third-party backend); None for our own."""
    if cls.__module__.partition(".")[0] == "attention_zoo":
        return None
    return _short(Path(inspect.getfile(cls)).read_bytes())


def _files(root: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    for path in root.rglob(f"*.{suffix}"):
        inside = path.relative_to(root)
        if inside.parts[0] not in UNSEEN:
            yield f"{suffix}:{inside.as_posix()}", path


def _digest(files: list[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, path in sorted(files):
        content = path.read_bytes()
        # Name and size first, so that bytes cannot wander from one file to the next.
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        inside = {str(key): (f"{path}.{key}" if path else str(key), item) for key, item in value.items()}
        return {key: _plain(item, dotted) for key, (dotted, item) in inside.items() if dotted not in COSMETIC}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"config must hold plain values only, got {path}={value!r} of type {type(value).__name__}")
