"""What `experiments.convert` and `experiments.evaluate` do: their options, checked by type, and their work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from attention_zoo.files import write_json
from attention_zoo.integrations.weights.convert import convert, is_ours, open_model
from attention_zoo.integrations.weights.lengthen import lengthen
from attention_zoo.integrations.weights.score import score
from attention_zoo.integrations.weights.tokeniser import read_tokeniser
from attention_zoo.model.saved import save
from attention_zoo.model.transformer import Transformer
from attention_zoo.schemas import store
from attention_zoo.tasks.text import read_files
from attention_zoo.training.config import device_of


@dataclass
class LengthenConfig:
    """What to make of the model.

    Fields:
        attention: longformer | bigbird | any pattern: the new mechanism; null leaves the model as it is.
        max_length: tokens that learned positions shall reach.
        positions: the position scheme with other options: {name: rotary, scaling: linear, factor: 4}.
        options: of the new mechanism: {window: 256}.
    """

    attention: str | None = None
    max_length: int | None = None
    positions: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ConvertConfig:
    """conf/convert.yaml.

    Fields:
        source: folder of a checkpoint, id on the hub, or a model of ours.
        output: folder to write: model.safetensors and the tokeniser.
        head: lm | hidden; null: what the checkpoint has.
        dtype: float32 | float64 | bfloat16 | float16; null: the checkpoint's.
        revision: branch, tag or commit on the hub.
        ignore: keys of the checkpoint's config that change nothing, though the conversion does not know them.
        lengthen: to swap the attention.
        force: write over a model that is there.
    """

    source: str = MISSING
    output: str = MISSING
    head: str | None = None
    dtype: str | None = None
    revision: str | None = None
    ignore: list[str] = field(default_factory=list)
    lengthen: LengthenConfig = field(default_factory=LengthenConfig)
    force: bool = False


@dataclass
class TextConfig:
    """What to score on.

    Fields:
        path: a file, or a folder whose files are texts of their own.
        suffix: ending of the files to take from a folder; null takes all.
        max_bytes: about how much to read at most; null reads all.
    """

    path: str = MISSING
    suffix: str | None = None
    max_bytes: int | None = 1_000_000


@dataclass
class EvaluateConfig:
    """conf/evaluate.yaml.

    Fields:
        source: folder that `convert` wrote, a finished run's, a checkpoint's, or an id on the hub.
        task: the text.
        seq_len: tokens of a window; null: what the model's positions hold, at most 1024.
        stride: tokens from one window to the next (causal); null: half a window.
        batch: windows of a call.
        mask_probability: share of tokens that are masked (masked language models).
        seed: of which tokens are masked.
        device: auto | cpu | cuda.
        output: JSON file for the figures; null: they are only shown.
    """

    source: str = MISSING
    task: TextConfig = field(default_factory=TextConfig)
    seq_len: int | None = None
    stride: int | None = None
    batch: int = 8
    mask_probability: float = 0.15
    seed: int = 0
    device: str = "auto"
    output: str | None = None


def register() -> None:
    """Make both schemas known to Hydra."""
    store("convert_schema", ConvertConfig)
    store("evaluate_schema", EvaluateConfig)


def run_convert(config: ConvertConfig) -> Path:
    """Convert, perhaps lengthen, and write a folder that needs no transformers to load. Says what it did."""
    folder = Path(config.output).expanduser()
    if (target := folder / "model.safetensors").exists() and not config.force:
        raise ValueError(f"output={folder} holds a model; force=true writes over it")
    model = _source(config)
    wanted = config.lengthen
    if wanted.attention is not None:
        model = lengthen(
            model,
            attention=wanted.attention,
            max_length=wanted.max_length,
            positions=wanted.positions,
            **wanted.options,
        )
    elif wanted != LengthenConfig():
        raise ValueError(f"lengthen.attention must name the new attention, got null beside {wanted}")
    tokeniser = read_tokeniser(config.source, revision=config.revision)
    save(model, target)
    if tokeniser is not None:
        tokeniser.model_max_length = model.config["max_length"]
        tokeniser.save_pretrained(folder)
    origin, names = model.config["origin"] or {}, [entry["name"] for entry in model.config["attention"]]
    print(f"{config.source}: {origin.get('model_type', 'model')} with {model.parameter_count:,} parameters")
    print(f"attention: {', '.join(dict.fromkeys(names))}; up to {model.config['max_length']} tokens")
    if left_out := origin.get("left_out"):
        print(f"not converted: {', '.join(left_out)}")
    print(f"tokeniser: {'none found' if tokeniser is None else type(tokeniser).__name__}")
    print(f"written to {folder}")
    return target


def _source(config: ConvertConfig) -> Transformer:
    path = Path(config.source).expanduser()
    if is_ours(path):
        found = open_model(path)
        if not isinstance(found, Transformer):
            raise ValueError(f"source={path} must hold one Transformer, got {type(found).__name__}")
        return found
    names = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.dtype is not None and config.dtype not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {config.dtype!r}")
    dtype = None if config.dtype is None else names[config.dtype]
    return convert(path if path.is_dir() else config.source, head=config.head, dtype=dtype, revision=config.revision,
                   ignore=config.ignore)  # fmt: skip


def run_evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Score a model on a text, show the figures, and write them where asked."""
    root = Path(config.task.path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"task.path={root} does not exist")
    texts = [raw for _, raw in read_files(root, config.task.suffix, config.task.max_bytes)]
    model: Any = open_model(config.source).to(device_of(config.device))
    tokeniser = read_tokeniser(config.source)
    if tokeniser is None and getattr(model, "vocab", 256) != 256:
        raise ValueError(f"source={config.source} has no tokeniser beside it, and {model.vocab} tokens are no bytes")
    found = score(
        model, texts, tokeniser, seq_len=config.seq_len, stride=config.stride, batch=config.batch,
        mask_probability=config.mask_probability, seed=config.seed,
    )  # fmt: skip
    for name, value in found.items():
        print(f"{name:14} {value:,}" if isinstance(value, int) else f"{name:14} {value:.6g}")
    if config.output is not None:
        write_json(config.output, found)
    return found
