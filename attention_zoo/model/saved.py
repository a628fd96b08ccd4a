"""A model as one file: weights as safetensors, and in its header the JSON config that rebuilds the model around them.

No pickle, hence nothing runs on loading but this project's own constructors; and no Hydra. The header holds a SHA-256
of config and weights, too, so that a damaged file is no model; files from before there was one still load. What a
config asks for is held against the weights before anything of that size is built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from attention_zoo.files import write_atomic
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.parameters import current_names
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import inner, is_sharded
from attention_zoo.rules import shown

FORMAT = 1
PREFIXES = {"Transformer": ("",), "EncoderDecoder": ("encoder.", "decoder.")}
"""Of the weights of each Transformer in a model of either kind."""
NAME = "model.safetensors"
"""Of the model in the folder of a run."""
CONFIG, DIGEST = "attention_zoo", "sha256"
_KEYS = {CONFIG, DIGEST, "format"}
"""In the file's metadata. Other tools of safetensors write "format"; we do not."""
_ENVELOPES = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing of a part put into the names of its weights."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save(model: Any, path: str | Path) -> Path:
    """Write a model, atomically.

    Args:
        model: a Transformer or an EncoderDecoder built from names, mappings, or partials of registered classes; or
            what torch.compile, DataParallel, DistributedDataParallel or AveragedModel made of one.
        path: of the file; parent folders are made.

    Raises:
        ValueError: if the model's config cannot be written, naming the option, or does not say all that the model is:
            with adapters, pruned, quantised or sharded weights.
    """
    model = inner(model, "save")
    header = {"format": FORMAT, "kind": type(model).__name__, "config": _checked(model)}
    text = json.dumps(header, allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _whole(model, header).items()}
    return write_atomic(path, _with_digest(to_bytes(tensors, {CONFIG: text}), _digest(text, tensors)))


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Transformer | EncoderDecoder:
    """Read what `save` wrote: the same weights bit for bit, in evaluation mode.

    Args:
        path: of the file, or of the folder of a finished run.
        device: where the model shall be.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, no model of ours, its weights do not fit its config, or are not finite; or for a
            device that this machine lacks.
    """
    _check_device(device)
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    with _one_line(path, "not a readable model file"), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    header = _header(path, metadata, tensors)
    for prefix in PREFIXES[header["kind"]]:
        tensors = current_names(tensors, prefix)
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_sizes(path, header, given)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: nobody shall notice
        with _one_line(path, "its config builds no model"):
            outline = _outline(header)
            if outline is not None and (wrong := _difference(outline, given)):
                raise ValueError(f"{path}: {wrong}")
            model = _build(header).eval()
    if wrong := _difference(_shapes(model), given):
        raise ValueError(f"{path}: {wrong}")
    _fill(path, model, tensors)
    return model.to(device)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; those that have several names under the first."""
    named = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    first = set(named.values())
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in first}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def _checked(model: Transformer | EncoderDecoder) -> dict[str, Any]:
    if type(model) not in (Transformer, EncoderDecoder) and not _is_split(model):
        raise ValueError(f"save knows Transformer and EncoderDecoder alone, not the subclass {type(model).__name__}")
    parts = [model.config] if isinstance(model, Transformer) else list(model.config.values())
    for config in parts:
        if None in [*config["attention"], *config["around"]]:
            raise ValueError(
                "save needs attention given by name, mapping or partial of a registered class: "
                "another callable cannot be written down; register it under the entry points attention_zoo.backends"
            )
        try:
            json.dumps(config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"save needs options that are plain numbers, words and lists: {error}") from None
    return model.config


def _is_split(model: nn.Module) -> bool:
    """Whether this process holds a part of the weights alone."""
    return any(map(is_sharded, model.modules())) or any(hasattr(each, "full_tensor") for each in model.parameters())


def _whole(model: nn.Module, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by name.

    Raises:
        ValueError: if they are not those that the config builds.
    """
    if _is_split(model):
        raise ValueError(
            "save needs whole weights, and these are sharded: gather them with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict and load them "
            "into an unsharded model of the same config"
        )
    tensors = own_tensors(model)
    if other := sorted(name for name, value in tensors.items() if not isinstance(value, Tensor)):
        raise ValueError(f"save needs plain weights, and {_some(other)} is quantised or packed: save before that")
    for envelope in _ENVELOPES:
        tensors = {name.replace(envelope, ""): tensor for name, tensor in tensors.items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("save needs weights, and this model is on the meta device: load some first")
    outline = _outline(header)
    wrong = _difference(outline, {name: tuple(tensor.shape) for name, tensor in tensors.items()}) if outline else None
    if wrong:
        raise ValueError(
            f"save needs the weights that the model's config builds: {wrong}; merge adapters, and make pruning and "
            "parametrisations permanent, first"
        )
    return tensors


def _with_digest(data: bytes, digest: str) -> bytes:
    """The same safetensors file with the digest in its metadata, which safetensors itself writes in no fixed order."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"][DIGEST] = digest
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[start:]])


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a config and of every weight's name, dtype, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _one_line(path: Path, wrong: str) -> Iterator[None]:
    """Whatever is raised inside is about the file: what was written there by others may raise anything."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        text = text.splitlines()[0][:300]  # torch's own go on with a stack of C++
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {wrong}: {text}") from None


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        text = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device must be one that is here, got {device!r}: {text[:300]}") from None


def _header(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    text = metadata.get(CONFIG)
    if text is None:
        raise ValueError(f"{path}: holds tensors, but no model config of attention_zoo")
    digest = metadata.get(DIGEST)  # there was none before
    if metadata.keys() - _KEYS or digest not in (None, _digest(text, tensors)):
        raise ValueError(
            f"{path}: damaged: its config and weights are not those whose SHA-256 stands in its header; "
            "take another copy, or train or convert the model anew"
        )
    try:
        header = json.loads(text)
        kind, version, config = header["kind"], header["format"], header["config"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: holds tensors, but no model config of attention_zoo") from None
    if type(version) is not int or version != FORMAT or kind not in tuple(PREFIXES):
        raise ValueError(f"{path}: format {shown(version)} of {shown(kind)} is not known here, only {FORMAT}")
    if not isinstance(config, dict) or not all(isinstance(part, dict) for part in _parts(header)):
        raise ValueError(f"{path}: its config must be a mapping of options, for encoder and decoder each")
    return header


def _check_sizes(path: Path, header: Mapping[str, Any], given: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config that asks for more than its weights are, before anything of that size is built.

    Each block has a weight, and the embedding vocab · dim numbers; widths are compared one by one later (`_outline`).
    """
    numbers = sum(map(math.prod, given.values()))
    for part in _parts(header):
        entries = part.get("attention")
        if isinstance(entries, list) and len(entries) > len(given):
            raise ValueError(f"{path}: its config names {len(entries)} mechanisms, and it has {len(given)} tensors")
        for options in [part, *_inside(entries)]:
            for key, most in {"depth": len(given), "dim": numbers, "vocab": numbers, "heads": numbers}.items():
                value = options.get(key) if isinstance(options, dict) else None
                if isinstance(value, int | float) and value > most:
                    raise ValueError(
                        f"{path}: its config says {key}={value}, and its {len(given)} tensors hold {numbers} numbers"
                    )


def _inside(entries: Any) -> Iterator[Any]:
    """Every mechanism that a config names, wrappers and what stands inside them."""
    for entry in entries if isinstance(entries, list) else [entries]:
        yield entry
        if isinstance(entry, dict) and "inner" in entry:
            yield from _inside(entry["inner"])


def _parts(header: Mapping[str, Any]) -> list[Any]:
    """The config of each Transformer."""
    config = header["config"]
    return [config] if header["kind"] == "Transformer" else [config.get("encoder"), config.get("decoder")]


def _build(header: Mapping[str, Any]) -> Transformer | EncoderDecoder:
    built = [Transformer(**part) for part in _parts(header)]
    return built[0] if len(built) == 1 else EncoderDecoder(encoder=built[0], decoder=built[1])


def _outline(header: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the weights that a config builds, at no cost in memory.

    None where a mechanism of another package reads numbers while it is built, which the meta device has none of.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _shapes(_build(header))
    except (NotImplementedError, RuntimeError):
        return None


def _difference(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str | None:
    """How weights differ from those that are expected, in words."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        return f"weights do not fit the config: missing {_some(missing)}, unexpected {_some(unknown)}"
    for name, shape in expected.items():
        if shape != given[name]:
            return f"{name} must have shape {shape}, got {given[name]}"
    return None


def _fill(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    floating = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    learned = {name for name, _ in model.named_parameters()}
    for name, target in own_tensors(model.to(floating)).items():
        tensor = tensors[name]
        kind = target.is_floating_point()
        if kind != tensor.is_floating_point() or (name in learned and tensor.dtype not in _DTYPES):
            raise ValueError(f"{path}: {name} must be of dtype {target.dtype}, got {tensor.dtype}")
        if name in learned and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{path}: weights must be finite, got NaN or infinity in {count:,} of {tensor.numel():,} numbers of "
                f"{name}: the training diverged, or the file was changed"
            )
        # the dtype that was saved; cloned, since results differ in the last bit where memory is not aligned as usual
        target.data = tensor.clone()


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
