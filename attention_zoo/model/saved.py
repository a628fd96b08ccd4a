"""A model as one file: weights as safetensors, and in its header the JSON config that rebuilds the model around them.

No pickle, hence nothing runs on loading but this project's own constructors; and no Hydra.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from attention_zoo.files import write_atomic
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.transformer import Transformer

FORMAT = 1


def save(model: Transformer | EncoderDecoder, path: str | Path) -> Path:
    """Write a model, atomically.

    Args:
        model: built from names, mappings, or partials of registered classes.
        path: of the file; parent folders are made.

    Raises:
        ValueError: if the model's config cannot be written, naming the option.
    """
    header = {"format": FORMAT, "kind": type(model).__name__, "config": _checked(model)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own_tensors(model).items()}
    return write_atomic(path, to_bytes(tensors, {"attention_zoo": json.dumps(header, allow_nan=False)}))


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Transformer | EncoderDecoder:
    """Read what `save` wrote: the same weights bit for bit, in evaluation mode.

    Args:
        path: of the file.
        device: where the model shall be.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, no model of ours, or its weights do not fit its config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such model file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable model file: {error}") from None
    header = _header(path, metadata)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: nobody shall notice
        try:
            model = _build(header["kind"], header["config"])
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: its config builds no model: {error}") from None
    floating = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    model = model.to(floating)
    _fill(path, model, tensors)
    return model.to(device).eval()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; those that have several names under the first."""
    named = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    first = set(named.values())
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in first}


def _checked(model: Transformer | EncoderDecoder) -> dict[str, Any]:
    parts = [model.config] if isinstance(model, Transformer) else list(model.config.values())
    for config in parts:
        if None in config["attention"]:
            raise ValueError(
                "save needs attention given by name, mapping or partial of a registered class: "
                "another callable cannot be written down; register it under the entry points attention_zoo.backends"
            )
        try:
            json.dumps(config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"save needs options that are plain numbers, words and lists: {error}") from None
    return model.config


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata["attention_zoo"])
        kind, version, config = header["kind"], header["format"], header["config"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: holds tensors, but no model config of attention_zoo") from None
    if version != FORMAT or kind not in ("Transformer", "EncoderDecoder") or not isinstance(config, dict):
        raise ValueError(f"{path}: format {version!r} of {kind!r} is not known here, only {FORMAT}")
    return header


def _build(kind: str, config: dict[str, Any]) -> Transformer | EncoderDecoder:
    if kind == "Transformer":
        return Transformer(**config)
    return EncoderDecoder(encoder=Transformer(**config["encoder"]), decoder=Transformer(**config["decoder"]))


def _fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = own_tensors(model)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{path}: weights do not fit the config: missing {_some(missing)}, unexpected {_some(unknown)}"
        )
    for name, target in expected.items():
        if target.shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} must have shape {tuple(target.shape)}, got {tuple(tensors[name].shape)}")
        # the dtype that was saved; cloned, since results differ in the last bit where memory is not aligned as usual
        target.data = tensors[name].clone()


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
