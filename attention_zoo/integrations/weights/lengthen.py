"""Make a short pretrained model long: swap its attention, tile its learned positions. Beltagy et al. 2020, §5.

    long = lengthen("roberta-base", attention="longformer", max_length=4096, window=256)

What the swap keeps is every weight: queries, keys and values enter the new mechanism as they are, and Longformer's
global projections start as copies of them. Positions beyond the table repeat it from the start, which keeps the local
structure that attention has learned everywhere but at the seams (the paper's finding; drawing them anew needs far more
training). Wrappers stay around the stack. Where the new mechanism sees all that the old one saw, outputs are the same.

Rotary, sinusoidal and relative positions have no end; a rotary model may be stretched through `positions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Unsupported, at_least, named
from attention_zoo.integrations.weights.convert import open_model
from attention_zoo.model.saved import own_tensors
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import inner
from attention_zoo.registry import recipe

KEPT = ("kv_heads", "head_width", "bias", "scale", "positions", "seed")
"""Options of the old mechanism that the new one takes over."""


def lengthen(
    model: Transformer | str | Path,
    *,
    attention: str,
    max_length: int | None = None,
    positions: Mapping[str, Any] | None = None,
    **options: Any,
) -> Transformer:
    """A copy of a model with another attention and room for more tokens, in evaluation mode.

    Args:
        model: ours, with a pattern (full, longformer, bigbird, ...) in each layer; or where one lies: a file or folder
            of ours, a checkpoint's folder, or the id of one on the hub.
        attention: name of a pattern.
        max_length: tokens that learned positions shall reach; default as before. Other positions know no end.
        positions: the model's position scheme with other options, such as a rotary `scaling` or `base`.
        options: of the new attention.

    Raises:
        Unsupported: for a mechanism that is no pattern, so that weights would mean something else.
        ValueError: where weights would be lost or would have to be invented, or the table cannot grow.
    """
    old = open_model(model) if isinstance(model, str | Path) else inner(model, "lengthen")
    if not isinstance(old, Transformer):
        raise ValueError(f"lengthen takes one Transformer, got {type(old).__name__}")
    for name in (attention, *{str(getattr(layer, "name", layer)) for layer in old.stack.attentions}):
        if not issubclass(recipe(name)[0], PatternAttention):
            raise Unsupported(
                "lengthen", f"attention={name}", "its queries and keys are no plain pattern's", "longformer or bigbird"
            )
    swapped = _swapped(old.config["attention"], {**options, "name": attention})
    config = {**old.config, "attention": swapped, **_room(old, max_length)}
    if positions is not None:
        scheme, before = named("positions", positions)[0], named("positions", config["positions"])[0]
        if scheme != before:
            raise ValueError(f"positions must stay {before} with other options, got {scheme}")
        config["positions"] = dict(positions)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away
        new = Transformer(**config)
    source = own_tensors(old)
    floating = next(tensor for tensor in source.values() if tensor.is_floating_point())
    new = new.to(floating.device, floating.dtype)
    _fill(new, source)
    return new.eval()


def _swapped(entries: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mechanisms of a model's config with the new attention in each one's place; wrappers stay around it."""
    return [
        {**entry, "inner": _swapped(entry["inner"], new)}
        if recipe(entry["name"])[0].wraps
        else {**{key: value for key, value in entry.items() if key in KEPT}, **new}
        for entry in entries
    ]


def _room(old: Transformer, max_length: int | None) -> dict[str, Any]:
    before = old.config["max_length"]
    if max_length is None:
        return {}
    at_least(before, max_length=max_length)
    scheme = named("positions", old.config["positions"])[0]
    if scheme == "axial" and max_length > before:
        raise ValueError(f"max_length must stay {before}: the two tables of axial positions cannot be tiled")
    return {"max_length": max_length}


@torch.no_grad()
def _fill(new: Transformer, source: Mapping[str, Tensor]) -> None:
    own, source = ({_within(name): tensor for name, tensor in each.items()} for each in (own_tensors(new), source))
    origin = {name: name if name in source else name.replace("_global.", ".") for name in own}
    lost = sorted(source.keys() - set(origin.values()))
    invented = sorted(name for name, there in origin.items() if there not in source)
    if lost or invented:
        raise ValueError(
            "lengthen must keep every weight and invent none: "
            f"{', '.join(lost) or 'nothing'} would be lost, {', '.join(invented) or 'nothing'} invented"
        )
    for name, target in own.items():
        given = source[origin[name]]
        if name == "positions.table.weight":
            given = given[torch.arange(len(target), device=given.device) % len(given)]
        target.copy_(given)


def _within(name: str) -> str:
    """The name that a weight of a block has in a stack with no wrapper around it: only one of the two may have some."""
    return re.sub(r"^stack\.(inner\.)+", "stack.", name)
