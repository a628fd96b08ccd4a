"""From a checkpoint of transformers to our skeleton, with the same outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo.integrations.weights.checkpoint import read_checkpoint
from attention_zoo.integrations.weights.families import FAMILIES
from attention_zoo.integrations.weights.mapping import fill
from attention_zoo.integrations.weights.settings import Settings
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.saved import load
from attention_zoo.model.transformer import Transformer


def convert(
    source: str | Path,
    *,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    ignore: Collection[str] = (),
) -> Transformer:
    """The checkpoint as a model of ours, in evaluation mode. `zoo.save` writes it, `zoo.load` needs no transformers.

    Args:
        source: a folder with config.json and safetensors or PyTorch files, or the id of a model on the hub.
        head: "lm" (masked or causal, as the family is) or "hidden"; default what the checkpoint has.
        dtype: of the weights; default the checkpoint's.
        revision: branch, tag or commit on the hub.
        ignore: keys of the config that change nothing, though the conversion does not know them.

    Raises:
        FileNotFoundError: where something is missing.
        Unsupported: for a model or a setting that the skeleton cannot honour, by name.
        ValueError: for a damaged file, and for missing or unknown keys, all of them listed.
    """
    found = read_checkpoint(source, revision=revision)
    settings = Settings(found.config, str(source), ignore)
    family = FAMILIES.get(settings.model_type)
    if family is None:
        raise settings.unsupported(
            "model_type", settings.model_type, "this family is not converted", " or ".join(sorted(FAMILIES))
        )
    plan = family.plan(settings, found.tensors, family.head(settings, found.config.get("architectures"), head))
    settings.finish()
    origin = {"model_type": settings.model_type, "attention_dropout": plan.attention_dropout}
    origin |= caution(origin, plan.options)
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: nobody shall notice
            model = Transformer(**plan.options, origin=origin)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its config builds no model: {error}") from None
    model = model.to(dtype or _dtype(found.tensors))
    left_out = fill(model, plan.rules, found.tensors, unused=plan.unused, where=str(source))
    model.config["origin"] = {**origin, "left_out": left_out}
    return model.eval()


def open_model(source: str | Path) -> Transformer | EncoderDecoder:
    """A model from wherever it lies: a file of `zoo.save`, a folder with one, or a checkpoint as `convert` takes it."""
    path = Path(source).expanduser()
    if not is_ours(path):
        return convert(source)
    model = load(_file_in(path))
    if isinstance(model, Transformer) and (origin := model.config["origin"]):  # a file may be older than the caution
        model.config["origin"] = {**origin, **caution(origin, model.config)}
    return model


def caution(origin: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
    """What training is warned of, as the model's `origin` holds it: dropout inside attention, which is not here.

    Args:
        origin: of the weights.
        options: of the model.
    """
    dropped = origin.get("attention_dropout")
    if not dropped:
        return {}
    return {
        "caution": f"these weights were trained with dropout {dropped} inside attention, which fused kernels do not "
        "have: here dropout acts on the outputs of branches alone "
        f"(output_dropout={options.get('output_dropout', 0.0)})"
    }


def is_ours(path: Path) -> bool:
    """Whether that is a file, or a folder without the config.json that checkpoints of transformers have."""
    return path.is_file() or (path.is_dir() and not (path / "config.json").exists())


def _file_in(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{path}: holds neither config.json nor model.safetensors")
    return file


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That of the first tensor of floating point."""
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
