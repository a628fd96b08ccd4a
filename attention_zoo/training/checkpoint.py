"""Everything that a run needs to go on exactly: weights, optimizer, place in the data, random state, carried state.

A checkpoint is one file: a line that says what it is, the SHA-256 of the rest, the rest (`torch.save`, read back with
`weights_only=True`). The digest finds every damaged byte, where a zip archive alone would load damaged tensors. It is
written beside its target and renamed over it: killed at any moment, the file is the old one or the new one. The one
before stays beside it, for a newest one that a disk has torn.
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.files import write_atomic

HEADER = b"attention_zoo checkpoint 1\n"
PLAIN = (bool, int, float, str, type(None))
CURE = "use force=true to start afresh"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, foreign, or of another run. One line that says which."""


class OtherRun(CheckpointError):
    """A sound checkpoint, but of another config, other code, another torch, device or thread count."""


def save_checkpoint(path: str | Path, content: dict[str, Any], *, before: str | Path | None = None) -> None:
    """Write `content`: nested dicts and lists of tensors and plain values.

    Args:
        before: a name beside it under which the file that was there is kept; None: it goes.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    write_atomic(path, HEADER + hashlib.sha256(body).hexdigest().encode() + b"\n" + body, before=before)


def load_checkpoint(path: str | Path, identity: str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Args:
        path: of the file.
        identity: of the run that wants to go on; it must be the one that wrote the file.

    Raises:
        OtherRun: for a sound file of another run.
        CheckpointError: for a file that is damaged or no checkpoint.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:  # a folder in its place, no permission, a bad disk
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; {CURE}") from None
    if not raw.startswith(HEADER):
        raise CheckpointError(f"{path} is no attention_zoo checkpoint; {CURE}")
    digest, _, body = raw[len(HEADER) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest; {CURE}")
    try:
        content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign body makes of the reader; its advice to trust the file is not ours
        raise foreign(path, f"its body is not what save_checkpoint writes ({type(error).__name__})") from None
    if not isinstance(content, dict) or not isinstance(content.get("identity"), str):
        raise foreign(path, "it names no run")
    if content["identity"] != identity:
        raise OtherRun(f"{path} belongs to run {content['identity']}, not to {identity}")
    return content


def foreign(path: str | Path, why: str) -> CheckpointError:
    """The error for a file whose digest is right and whose content is none of ours."""
    return CheckpointError(f"{path} is no checkpoint of this project: {why}; {CURE}")


def load_weights(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load weights, and name the first that does not fit.

    Raises:
        CheckpointError: for a missing, unknown or misshapen weight, and for one that holds NaN or infinity: no step of
            ours leaves such a one behind.
    """
    expected = module.state_dict()
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name in sorted({*expected, *state}):
        if name not in state:
            raise CheckpointError(f"{path} lacks the weight {name} of this model; {CURE}")
        if name not in expected:
            raise CheckpointError(f"{path} holds the weight {name}, which this model has not; {CURE}")
        if state[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, this model needs {tuple(expected[name].shape)}; "
                f"{CURE}"
            )
        if name in trained and not bool(torch.isfinite(state[name]).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; {CURE}")
    module.load_state_dict(state)


def check_like(own: Any, given: Any, where: str, path: str | Path) -> None:
    """Hold what a file says against what this run would write: the same types, keys, shapes and dtypes.

    What is None or an empty list here may be anything there: it is None or empty at a run's beginning alone.

    Raises:
        CheckpointError: naming the place.
    """
    if own is None or (isinstance(own, dict) and own == {"plain": None}):
        return
    if type(own) is not type(given):
        raise foreign(path, f"{where} must be {type(own).__name__}, got {type(given).__name__}")
    if isinstance(own, dict):
        if own.keys() != given.keys():
            raise foreign(path, f"{where} must have {', '.join(map(str, own))}, got {', '.join(map(str, given))}")
        for key, value in own.items():
            check_like(value, given[key], f"{where}.{key}", path)
    elif isinstance(own, list) and own:
        if len(own) != len(given):
            raise foreign(path, f"{where} must have {len(own)} entries, got {len(given)}")
        for index, (value, other) in enumerate(zip(own, given)):
            check_like(value, other, f"{where}.{index}", path)
    elif isinstance(own, Tensor):
        _check_tensor(given, own.shape, own.dtype, where, path)
    elif isinstance(own, float) and not math.isfinite(given):
        raise foreign(path, f"{where} must be finite, got {given}")


def check_optimizer(own: Any, given: Any, parameters: Sequence[Tensor], path: str | Path) -> None:
    """Hold an optimizer's state against the optimizer that shall take it, before its first step has made one.

    Raises:
        CheckpointError: naming the place.
    """
    groups, states = own["param_groups"], given["state"]
    check_like(groups, given["param_groups"], "optimizer.param_groups", path)
    for index, (group, other) in enumerate(zip(groups, given["param_groups"])):
        for key, value in group.items():
            if key != "lr" and not isinstance(value, Tensor) and other[key] != value:
                raise foreign(path, f"optimizer.param_groups.{index}.{key} must be {value!r}, got {other[key]!r}")
    if not isinstance(states, dict) or not states.keys() <= set(range(len(parameters))):
        raise foreign(path, f"optimizer.state must be of parameters 0 to {len(parameters) - 1}")
    first: Any = next(iter(states.values()), None)
    for index, state in states.items():
        kinds = isinstance(state, dict) and {name: type(value) for name, value in state.items()}
        if not kinds or kinds != {name: type(value) for name, value in first.items()}:
            raise foreign(path, f"optimizer.state.{index} is not built as the others are")
        for name, value in state.items():
            if isinstance(value, Tensor):
                shape = value.shape if value.dim() == 0 else parameters[index].shape
                _check_tensor(value, shape, value.dtype, f"optimizer.state.{index}.{name}", path)


def _check_tensor(given: Tensor, shape: Sequence[int], dtype: torch.dtype, where: str, path: str | Path) -> None:
    if tuple(given.shape) != tuple(shape) or given.dtype != dtype:
        raise foreign(
            path, f"{where} must be {dtype} of shape {tuple(shape)}, got {given.dtype} of {tuple(given.shape)}"
        )
    if given.is_floating_point() and not bool(given.isfinite().all()):
        raise foreign(path, f"{where} holds NaN or infinity")


def pack(value: Any, seen: dict[int, int] | None = None) -> Any:
    """A recurrent state as dicts, lists, tensors and plain values, which is all that a safe reader accepts.

    A sequence that stands in it twice, as one object, is written once: layers share what they know of their tokens.

    Raises:
        TypeError: for anything that is no tensor, tuple, list, dict or plain value, naming its type.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return value.detach().clone()  # a view into a preallocated cache would drag all of it along
    if isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, dict):
        return {"dict": [[key, pack(inner, seen)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        if id(value) in seen:
            return {"again": seen[id(value)]}
        seen[id(value)] = len(seen)
        kind = type(value)
        name = kind.__name__ if kind in (list, tuple) else f"{kind.__module__}:{kind.__qualname__}"
        return {"sequence": name, "items": [pack(inner, seen) for inner in value]}
    raise TypeError(f"a recurrent state must be made of tensors, tuples, lists, dicts and plain values, got {value!r}")


def unpack(value: Any, device: Any = "cpu", made: dict[int, Any] | None = None) -> Any:
    """What `pack` was given. Named tuples are looked up among loaded modules; nothing is imported, no code is run."""
    made = {} if made is None else made
    if isinstance(value, Tensor):
        return value.to(device)
    if "plain" in value:
        return value["plain"]
    if "dict" in value:
        return {key: unpack(inner, device, made) for key, inner in value["dict"]}
    if "again" in value:
        return made[value["again"]]
    number = len(made)
    made[number] = None  # sequences are counted as they begin
    items = [unpack(inner, device, made) for inner in value["items"]]
    made[number] = _sequence(value["sequence"], items)
    return made[number]


def _sequence(name: str, items: list[Any]) -> Any:
    if name in ("list", "tuple"):
        return items if name == "list" else tuple(items)
    module, _, qualname = name.partition(":")
    kind: Any = sys.modules.get(module)
    for part in qualname.split("."):
        kind = getattr(kind, part, None)
    fits = isinstance(kind, type) and issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) >= len(items)
    if not fits:
        raise CheckpointError(
            f"the checkpoint's recurrent state holds a {name} of {len(items)} fields, unknown to this version: "
            f"begin the run anew with force=true, or end it with the version that wrote it"
        )
    return kind(*items)
