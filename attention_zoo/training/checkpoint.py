"""Everything that a run needs to go on exactly: weights, optimizer, place in the data, random state, carried state.

A checkpoint is one file: a line that says what it is, the SHA-256 of the rest, the rest (`torch.save`, read back with
`weights_only=True`). The digest finds every damaged byte, where a zip archive alone would load damaged tensors. It is
written beside its target and renamed over it: killed at any moment, the file is the old one or the new one.
"""

from __future__ import annotations

import hashlib
import io
import sys
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


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`: nested dicts and lists of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    write_atomic(path, HEADER + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


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


def pack(value: Any) -> Any:
    """A recurrent state as dicts, lists, tensors and plain values, which is all that a safe reader accepts.

    Raises:
        TypeError: for anything that is no tensor, tuple, list, dict or plain value, naming its type.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()  # a view into a preallocated cache would drag all of it along
    if isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, dict):
        return {"dict": [[key, pack(inner)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = type(value)
        name = kind.__name__ if kind in (list, tuple) else f"{kind.__module__}:{kind.__qualname__}"
        return {"sequence": name, "items": [pack(inner) for inner in value]}
    raise TypeError(f"a recurrent state must be made of tensors, tuples, lists, dicts and plain values, got {value!r}")


def unpack(value: Any, device: Any = "cpu") -> Any:
    """What `pack` was given. Named tuples are looked up among loaded modules; nothing is imported, no code is run."""
    if isinstance(value, Tensor):
        return value.to(device)
    if "plain" in value:
        return value["plain"]
    if "dict" in value:
        return {key: unpack(inner, device) for key, inner in value["dict"]}
    items = [unpack(inner, device) for inner in value["items"]]
    if value["sequence"] in ("list", "tuple"):
        return items if value["sequence"] == "list" else tuple(items)
    module, _, qualname = value["sequence"].partition(":")
    kind: Any = sys.modules.get(module)
    for part in qualname.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise CheckpointError(f"the checkpoint's recurrent state needs the named tuple {value['sequence']}: not found")
    return kind(*items)
