"""A pattern without projections, for a model that brings its own queries, keys and values.

Such a pattern stands outside the model's module tree: it has nothing to train and nothing to save. It is built once for
each set of options, width, device and dtype, at model width 1, so that the projections that every `PatternAttention`
has cost a few bytes; `attend` never uses them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens, Unsupported
from attention_zoo.layout.layout import Layout
from attention_zoo.registry import build, options_of, recipe


def at_columns(valid: Tensor, document: Tensor | None = None) -> Layout:
    """Tokens of a model that counts columns, as transformers and torch do: from a row's first on each has a position.

    So padding on the left moves nothing, and a hole takes its place. Both arguments are [B, L], as in `Tokens.of`, and
    fresh: nobody writes to them later.
    """
    begun = valid.cummax(1).values
    length = Tokens.of(begun & valid.flip(1).cummax(1).values.flip(1), document=document).length
    return Layout.fresh(Tokens.of(begun, document=document)._replace(valid=valid, length=length))


def at_padding_too(keys: Layout) -> Layout:
    """Queries at all columns of `at_columns`, those at padding among them: each sees what stands before it.

    Before its row's first token that is nothing, which a position before all others says.
    """
    if bool(keys.valid.all()):
        return keys
    begun = keys.valid.cummax(1).values
    position = torch.where(begun, keys.position, -1)
    return Layout.fresh(keys._replace(position=position, valid=torch.ones_like(begun)))


REASONS = {
    "reformer": "its queries are its keys, and it hashes them itself: there is no place for a model's own keys",
    "transformer_xl": "its memory holds hidden states, which it projects anew, and its scores have terms of their own",
}


def refusal(name: str) -> str | None:
    """Why a backend cannot work on queries, keys and values from elsewhere, or None."""
    if issubclass(recipe(name)[0], PatternAttention):
        return None
    return REASONS.get(name, "it is no PatternAttention: it does not work on given queries, keys and values")


def own_options(name: str) -> tuple[str, ...]:
    """The options that may be given: the mechanism's own, and the seed."""
    decided = inspect.signature(Attention).parameters
    return tuple(key for key in options_of(name) if key not in decided or key == "seed")


def bare_pattern(
    name: str,
    options: Mapping[str, Any],
    *,
    heads: int,
    kv_heads: int,
    head_width: int,
    causal: bool,
    cross: bool = False,
    layer: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PatternAttention:
    """The pattern of a backend, to be run through `attend`. The same arguments give the same object.

    Args:
        name: of a backend that is a pattern.
        options: its own options, and `seed`; of plain values, as in a JSON file.
        layer: number of the layer; added to the seed.
        dtype: of the queries; half precision computes its masks in float32.

    Raises:
        Unsupported: for a mechanism or an option that cannot work so.
        ValueError: for an unknown name, or a value outside its rule.
    """
    try:
        text = json.dumps(dict(options), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"the options of {name} must be plain values, got {dict(options)!r}: {error}") from None
    dtype = torch.promote_types(dtype, torch.float32)
    return _build(name, text, heads, kv_heads, head_width, causal, cross, layer, torch.device(device), dtype)


@lru_cache(maxsize=1024)
def _build(
    name: str,
    options: str,
    heads: int,
    kv_heads: int,
    head_width: int,
    causal: bool,
    cross: bool,
    layer: int,
    device: torch.device,
    dtype: torch.dtype,
) -> PatternAttention:
    given = json.loads(options)
    _check_options(name, given)  # here, behind the cache: it reads the mechanism's defaults from their file
    if "global_projections" in options_of(name):
        given = {"global_projections": "shared", **given}
    seed = given.pop("seed", 0) + layer
    shape = {"dim": 1, "heads": heads, "kv_heads": kv_heads, "head_width": head_width}
    # Built at the first call: the model's random numbers must not depend on that, nor its training on a first call
    # in inference mode.
    with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        pattern = build(name, **shape, causal=causal, cross=cross, seed=seed, **given)
        assert isinstance(pattern, PatternAttention)
        _check(name, pattern)
        return pattern.requires_grad_(False).eval().to(device=device, dtype=dtype)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    reason = refusal(name)
    if reason is not None:
        raise Unsupported(name, "attention on given queries, keys and values", reason, "longformer, bigbird or full")
    allowed, decided = own_options(name), inspect.signature(Attention).parameters
    for key in options:
        if key in decided and key not in allowed:
            raise Unsupported(name, f"option {key}", "the model around it decides that", " or ".join(allowed))


def _check(name: str, pattern: PatternAttention) -> None:
    """Refuse what would be lost without a word."""
    if pattern.computes_apart:
        raise Unsupported(
            name, "global_projections=separate", "the model has no second projection for global tokens",
            "global_projections=shared",
        )  # fmt: skip
    extra = getattr(pattern, "extra_global_tokens", 0)
    if extra:
        raise Unsupported(
            name, f"extra_global_tokens={extra}", "the model puts no learned tokens in front", "extra_global_tokens=0"
        )
    if pattern.bias_parameters() or pattern.losses() or pattern.sink is not None:
        raise Unsupported(
            name, "a pattern that learns", "its parameters would be neither trained nor saved with the model",
            "attention_zoo.Transformer",
        )  # fmt: skip
