"""Transformer-XL against numbers that real TransfoXL models gave: transformers 4.35.2, the last that runs them.

Whole language models with adaptive embeddings and softmax, their checkpoints converted; over several segments, from
memories of zeros (as they begin) or from none (as the original does). With pre-norm, gain and bias of a norm learn from
memories there and not here, and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from attention_zoo import Transformer
from attention_zoo.integrations import weights
from attention_zoo.integrations.weights.checkpoint import read_checkpoint
from attention_zoo.integrations.weights.settings import Settings

from .case import FLOAT64, Bounds, Case, Errors, gradients, measure

MODELS = sorted((Path(__file__).parent / "transfo_xl" / "models").iterdir())
LANGUAGE = Bounds(
    {torch.float32: Errors(1e-5, 1e-5), torch.float64: FLOAT64},
    "Whole language models with log-probabilities of up to 40; theirs in float32 is 1e-5 from its own float64.",
)


def converted(folder: Path, dtype: torch.dtype, *, empty: bool = False, segment: int | None = None) -> Transformer:
    model = weights.convert(folder, dtype=dtype)
    for layer in model.stack.attentions:
        layer.starts_blank = not empty
        layer.segment_length = segment or layer.segment_length
    return model


def run(model: Transformer, ids: Tensor, cuts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits over all pieces, and what each layer remembers in the end."""
    state, logits = model.initial_state(len(ids)), []
    for piece in ids.split(cuts, 1):
        out = model(piece, state=state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1), [block[0][0].held[0] for block in state.layers]


def errors(folder: Path, kind: str, dtype: torch.dtype, *, at_once: bool = False) -> Errors:
    numbers = load_file(folder / "numbers.safetensors")
    config = json.loads((folder / "config.json").read_text())
    ids, cuts = numbers["ids"], numbers["cuts"].tolist()
    model = converted(folder, dtype, empty=kind == "empty", segment=cuts[0])
    logits = model(ids).logits if at_once else run(model, ids, cuts)[0]
    found = read_checkpoint(folder)
    settings = Settings(found.config, str(folder))
    rules = weights.FAMILIES["transfo-xl"].plan(settings, found.tensors, "lm").rules
    left_out = ("layers.0.norm.weight", "layers.0.norm.bias") if config["pre_lnorm"] else ()
    leaves = {name: leaf for name, leaf in model.named_parameters() if not name.endswith(left_out or "nothing")}
    wanted = {
        name: rules[name].make(*(numbers[f"{kind}.gradient.{source}"] for source in rules[name].sources)).to(dtype)
        for name in leaves
    }
    return measure(
        logits,
        numbers[f"{kind}.logits32" if dtype == torch.float32 else f"{kind}.logits"],
        gradients((logits * numbers["weight"].to(dtype)).sum(), leaves),
        wanted,
        torch.ones_like(ids, dtype=torch.bool),
    )


def cases() -> Iterator[Case]:
    for folder in MODELS:
        for kind in ("zeros", "empty"):
            name = f"{folder.name}, from {kind}"
            yield Case("transformer_xl", "TransfoXL's own numbers", name, partial(errors, folder, kind), LANGUAGE)
