"""What a mechanism was given: keys that a query sees, how far it looks back, bytes of its state, FLOPs of a token.

A result stands for the mechanism at these, not for the mechanism. All are facts of the definition, whatever the kernel
does, for one row of the run's length without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens
from attention_zoo.layout.host import Array
from attention_zoo.measure.flops import LinearFlops, attention_flops, count_pairs
from attention_zoo.model.block import Block, attentions
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.short_conv import Convolution
from attention_zoo.model.state import state_bytes
from attention_zoo.model.transformer import Transformer

ROWS = 64
LONGEST = 16_384
"""Of a longer row so many first tokens are counted: each query against each key."""


def given_to(model: nn.Module, length: int) -> dict[str, Any]:
    """What a model was given for rows of `length` tokens; of an encoder-decoder only its positions.

    Returns:
        positions: its scheme; of both halves "encoder / decoder".
        length: tokens of the row that all this is of.
        keys_mean, keys_most: that a query of a layer scores, mean and most over queries and layers; for hashing the
            most that it may. None where a mechanism does not say.
        layer_reach: tokens that one layer looks back at most, without a short convolution.
        reach: tokens that the whole model looks back at most, within the row; None where it is not known.
        state_bytes: of one row after `length` tokens; None without a state.
        flops_per_token: of a forward call, by the definition; a step of training takes three times as many.
    """
    if isinstance(model, EncoderDecoder):
        halves = [given_to(half, 1) for half in (model.encoder, model.decoder)]
        return {**dict.fromkeys(halves[0]), "positions": " / ".join(str(each["positions"]) for each in halves)}
    assert isinstance(model, Transformer)
    length = min(length, LONGEST)
    facts = [seen_by(layer, length) for layer in attentions(model)] if _is_plain(model.stack) else []
    keys = [each.keys for each in facts if each.keys is not None]
    oldest = [each.oldest for each in facts if each.oldest is not None]
    counted, reached = 0 < len(facts) == len(keys), 0 < len(facts) == len(oldest)
    at = np.arange(length)
    return {
        "positions": _word(model.config["positions"]),
        "length": length,
        "keys_mean": float(np.mean(keys)) if counted else None,
        "keys_most": float(np.max(keys)) if counted else None,
        "layer_reach": max(int((at - each).max()) for each in oldest) if reached else None,
        "reach": _reach(oldest, _taps(model)) if reached else None,
        "state_bytes": _state_bytes(model, length),
        "flops_per_token": flops_per_token(model, length),
    }


class Seen(NamedTuple):
    """What each query of a row sees in one layer; None where the mechanism does not say.

    Fields:
        keys: [L], how many keys, the mean of the heads.
        oldest: [L], the first token that its output may depend on.
    """

    keys: Array | None
    oldest: Array | None


def seen_by(layer: nn.Module, length: int) -> Seen:
    """By what the mechanism says, or by its definition where it is a pattern."""
    if not isinstance(layer, Attention):
        return Seen(None, None)
    keys, oldest = layer.keys_seen(length), layer.oldest_seen(length)
    if isinstance(layer, PatternAttention) and (keys is None or oldest is None):
        return _counted(layer, length)
    return Seen(*(None if each is None else np.asarray(each) for each in (keys, oldest)))


@torch.no_grad()
def _counted(layer: PatternAttention, length: int) -> Seen:
    """By rows of few queries, so that nothing of size L x L exists. Who sees nothing depends on itself at most."""
    device = next(layer.parameters()).device
    tokens = layer.mark(Tokens.all_valid(1, length, device))
    keys, oldest = [], []
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        seen = layer.full_bias(tokens.cut(rows), tokens) > -torch.inf
        keys.append(seen.sum(-1, dtype=torch.float64).mean((0, 1)))
        first = seen.any(1)[0].to(torch.int8).argmax(-1)
        oldest.append(torch.minimum(first, torch.arange(rows.start, rows.stop, device=device)))
    return Seen(torch.cat(keys).cpu().numpy(), torch.cat(oldest).cpu().numpy())


def _reach(oldest: Sequence[Array], taps: int) -> int:
    """Of layers one after the other, each behind a convolution that looks `taps` tokens back."""
    at = np.arange(len(oldest[0]))
    found = at
    for each in oldest:
        start = (np.minimum(each, at) - taps).clip(min=0)
        found = np.array([found[low : high + 1].min() for low, high in zip(start, at)])
    return int((at - found).max())


def flops_per_token(model: Transformer, length: int) -> float | None:
    """Of a forward call over a row of `length` tokens; None where a mechanism's pairs are not known."""
    if not _is_plain(model.stack):
        return None
    total = 0
    for layer in attentions(model):
        pairs = count_pairs(layer, length) if isinstance(layer, Attention) else None
        if pairs is None:
            return None
        total += attention_flops(pairs, batch=1, heads=layer.heads, head_width=layer.head_width)  # type: ignore[arg-type]
    with _evaluated(model), LinearFlops(model) as linear:
        model(_ids(model, length))
    return (total + linear.flops) / length


def _state_bytes(model: Transformer, length: int) -> int | None:
    if not model.carries or model.cross:
        return None
    with _evaluated(model):
        return state_bytes(model(_ids(model, length), state=model.initial_state(1)).state)


def _ids(model: Transformer, length: int) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.arange(length, device=device)[None] % model.vocab


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Without gradients, and in evaluation; as it was before when it ends."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def _is_plain(stack: nn.Module) -> bool:
    """Whether all tokens go through all blocks, one after the other: no wrapper, no shorter middle."""
    blocks = [each for each in stack.modules() if isinstance(each, Block)]
    return list(getattr(stack, "layers", ())) == blocks


def _taps(model: nn.Module) -> int:
    """Tokens that the short convolution of a block looks back."""
    return max((part.width - 1 for part in model.modules() if isinstance(part, Convolution)), default=0)


def _word(positions: Any) -> str:
    return positions if isinstance(positions, str) else str(positions.get("name"))
